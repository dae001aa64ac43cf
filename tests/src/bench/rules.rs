//! The same cluster as rules: what kube-proxy writes in its modes nftables and iptables, loaded by their own programs into a
//! namespace of its own. Goes in as the cluster's size; comes out as how long it took.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tempfile::tempfile;

use super::{
    bounded::{self, Taken},
    cluster::{Size, cluster_ip, node_port},
    progress::tell,
};
use crate::netns::Namespace;

/// A program that takes rules on its standard input, all of them at once or none.
#[derive(Debug)]
pub struct Loader {
    /// What it is called in the report.
    pub name: &'static str,
    /// What its rules are of.
    pub tables: &'static str,
    command: &'static [&'static str],
    rules: fn(Size) -> Result<String>,
    change: fn(Size) -> Result<String>,
}

/// kube-proxy's two.
pub const LOADERS: [Loader; 2] = [
    Loader {
        name: "nft -f",
        tables: "nftables",
        command: &["nft", "-f", "-"],
        rules: nftables,
        change: nftables_change,
    },
    Loader {
        name: "iptables-restore",
        tables: "iptables",
        command: &["iptables-restore", "--noflush", "--counters"],
        rules: iptables,
        change: iptables_change,
    },
];

/// Where nothing is measured but what the rules do afterwards.
const PATIENCE: Duration = Duration::from_mins(30);

impl Loader {
    /// How long everything takes in an empty namespace, and then, if it is there, the change of one endpoint. Neither may take
    /// longer than `limit`.
    pub fn measure(&self, size: Size, limit: Duration) -> Result<(Taken, Option<Taken>)> {
        let namespace = Namespace::new("rules")?;
        let cold = self.load(&namespace, &(self.rules)(size)?, limit)?;
        let change = cold.is_all().then(|| self.load(&namespace, &(self.change)(size)?, limit));
        Ok((cold, change.transpose()?))
    }

    /// Puts everything into a namespace.
    pub fn fill(&self, namespace: &Namespace, size: Size) -> Result<()> {
        let taken = self.load(namespace, &(self.rules)(size)?, PATIENCE)?;
        ensure!(taken.is_all(), "{} has not loaded the rules in {PATIENCE:?}", self.name);
        Ok(())
    }

    fn load(&self, namespace: &Namespace, rules: &str, limit: Duration) -> Result<Taken> {
        let (program, arguments) = self.command.split_first().context("no program")?;
        let mut said = tempfile()?;
        let mut command = namespace.command(program)?;
        command.args(arguments).stdin(file_of(rules)?).stdout(Stdio::null()).stderr(said.try_clone()?);
        let going_on = |passed: Duration| {
            tell(&format!("{}: {} s of {} at most", self.name, passed.as_secs(), limit.as_secs()));
        };
        let (taken, status) =
            bounded::run(&mut command, limit, going_on).with_context(|| format!("cannot run {program}"))?;
        let mut complaint = String::new();
        said.seek(SeekFrom::Start(0))?;
        said.read_to_string(&mut complaint)?;
        let complaint: String = complaint.chars().take(400).collect();
        ensure!(status.is_none_or(|status| status.success()), "{} refuses the rules: {complaint}", self.name);
        Ok(taken)
    }
}

fn file_of(rules: &str) -> Result<File> {
    let mut file = tempfile()?;
    file.write_all(rules.as_bytes())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Eight letters and digits, as kube-proxy makes them of a hash.
fn tag(number: u32, index: u32) -> String {
    format!("{:08X}", number.wrapping_mul(0x9E37_79B1) ^ index.wrapping_mul(0x85EB_CA6B))
}

fn service(number: u32) -> String {
    format!("service-{}-team-{}/service-{number}/tcp/http", tag(number, 0), number % 100)
}

fn endpoint(number: u32, index: u32) -> String {
    format!("endpoint-{}-team-{}/service-{number}/tcp/http__{index}", tag(number, index + 1), number % 100)
}

/// What there is once, in the tables of both families of which one is enough here.
const NFT_BASE: &str = "add table ip kube-proxy
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add chain ip kube-proxy mark-for-masquerade
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add chain ip kube-proxy services
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat ; }
add rule ip kube-proxy nat-prerouting jump services
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add rule ip kube-proxy nat-output jump services
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority srcnat ; }
add rule ip kube-proxy nat-postrouting mark and 0x4000 != 0 masquerade fully-random
";

fn nftables(size: Size) -> Result<String> {
    let mut rules = NFT_BASE.to_owned();
    for number in 0..size.services {
        let (name, ip) = (service(number), cluster_ip(number));
        writeln!(rules, "add chain ip kube-proxy {name}")?;
        (0..size.endpoints).try_for_each(|index| nftables_endpoint(&mut rules, size, number, index, 0))?;
        nftables_service(&mut rules, size, number)?;
        writeln!(rules, "add element ip kube-proxy cluster-ips {{ {ip} }}")?;
        writeln!(rules, "add element ip kube-proxy service-ips {{ {ip} . tcp . 80 : goto {name} }}")?;
        if let Some(port) = node_port(number) {
            let external = name.replacen("service", "external", 1);
            writeln!(rules, "add chain ip kube-proxy {external}")?;
            writeln!(rules, "add rule ip kube-proxy {external} jump mark-for-masquerade")?;
            writeln!(rules, "add rule ip kube-proxy {external} goto {name}")?;
            writeln!(rules, "add element ip kube-proxy service-nodeports {{ tcp . {port} : goto {external} }}")?;
        }
    }
    Ok(rules)
}

fn nftables_service(rules: &mut String, size: Size, number: u32) -> Result<()> {
    let (name, ip) = (service(number), cluster_ip(number));
    let endpoints: Vec<String> =
        (0..size.endpoints).map(|index| format!("{index} : goto {}", endpoint(number, index))).collect();
    let (count, endpoints) = (endpoints.len(), endpoints.join(", "));
    writeln!(
        rules,
        "add rule ip kube-proxy {name} ip daddr {ip} tcp dport 80 ip saddr != 10.128.0.0/9 jump mark-for-masquerade"
    )?;
    writeln!(rules, "add rule ip kube-proxy {name} numgen random mod {count} vmap {{ {endpoints} }}")?;
    Ok(())
}

fn nftables_endpoint(rules: &mut String, size: Size, number: u32, index: u32, generation: u32) -> Result<()> {
    let (name, ip, port) = (endpoint(number, index), size.address(number, index, generation), size.port);
    writeln!(rules, "add chain ip kube-proxy {name}")?;
    writeln!(rules, "add rule ip kube-proxy {name} ip saddr {ip} jump mark-for-masquerade")?;
    writeln!(rules, "add rule ip kube-proxy {name} meta l4proto tcp dnat to {ip}:{port}")?;
    Ok(())
}

/// The first endpoint of a Service in the middle is another one.
fn nftables_change(size: Size) -> Result<String> {
    let number = size.services / 2;
    let mut rules = String::new();
    writeln!(rules, "flush chain ip kube-proxy {}", endpoint(number, 0))?;
    nftables_endpoint(&mut rules, size, number, 0, 1)?;
    writeln!(rules, "flush chain ip kube-proxy {}", service(number))?;
    nftables_service(&mut rules, size, number)?;
    Ok(rules)
}

/// The rules of a Service's and its endpoints' chains, which may be there already.
fn iptables_service(rules: &mut String, size: Size, number: u32, generation: u32) -> Result<()> {
    let (tag_of_service, ip) = (tag(number, 0), cluster_ip(number));
    let comment = format!("-m comment --comment \"team-{}/service-{number}:http\"", number % 100);
    writeln!(
        rules,
        "-A KUBE-SVC-{tag_of_service} {comment} ! -s 10.128.0.0/9 -d {ip}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ"
    )?;
    for index in 0..size.endpoints {
        let (sep, ip, port) = (tag(number, index + 1), size.address(number, index, generation), size.port);
        let chance = match size.endpoints - index {
            1 => String::new(),
            left => format!("-m statistic --mode random --probability {:.10} ", 1.0 / f64::from(left)),
        };
        writeln!(rules, "-A KUBE-SVC-{tag_of_service} {comment} {chance}-j KUBE-SEP-{sep}")?;
        writeln!(rules, "-A KUBE-SEP-{sep} {comment} -s {ip}/32 -j KUBE-MARK-MASQ")?;
        writeln!(rules, "-A KUBE-SEP-{sep} {comment} -p tcp -m tcp -j DNAT --to-destination {ip}:{port}")?;
    }
    Ok(())
}

fn iptables_chains(rules: &mut String, size: Size, number: u32) -> Result<()> {
    writeln!(rules, ":KUBE-SVC-{} - [0:0]", tag(number, 0))?;
    for index in 0..size.endpoints {
        writeln!(rules, ":KUBE-SEP-{} - [0:0]", tag(number, index + 1))?;
    }
    Ok(())
}

fn iptables(size: Size) -> Result<String> {
    let mut rules =
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n"
            .to_owned();
    (0..size.services).try_for_each(|number| iptables_chains(&mut rules, size, number))?;
    rules.push_str("-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n");
    rules.push_str("-A POSTROUTING -j KUBE-POSTROUTING\n-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n");
    rules.push_str("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n");
    rules.push_str("-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n");
    for number in 0..size.services {
        let (tag, ip) = (tag(number, 0), cluster_ip(number));
        let comment = format!("-m comment --comment \"team-{}/service-{number}:http cluster IP\"", number % 100);
        writeln!(rules, "-A KUBE-SERVICES {comment} -d {ip}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-{tag}")?;
        if let Some(port) = node_port(number) {
            writeln!(rules, "-A KUBE-NODEPORTS {comment} -p tcp -m tcp --dport {port} -j KUBE-SVC-{tag}")?;
        }
        iptables_service(&mut rules, size, number, 0)?;
    }
    rules.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n");
    Ok(rules)
}

fn iptables_change(size: Size) -> Result<String> {
    let number = size.services / 2;
    // Naming a chain empties it.
    let mut rules = "*nat\n".to_owned();
    iptables_chains(&mut rules, size, number)?;
    iptables_service(&mut rules, size, number, 1)?;
    rules.push_str("COMMIT\n");
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size { services: 20, endpoints: 3, port: 8080 };

    #[test]
    fn every_endpoint_is_in_both_sets_of_rules_once() {
        for (rules, translation) in [(nftables(SIZE), "dnat to "), (iptables(SIZE), "--to-destination ")] {
            let rules = rules.unwrap();
            for (number, index) in (0..SIZE.services).flat_map(|number| (0..3).map(move |index| (number, index))) {
                let wanted = format!("{translation}{}:8080\n", SIZE.address(number, index, 0));
                assert_eq!(rules.matches(&wanted).count(), 1, "{wanted}");
            }
        }
    }

    #[test]
    fn a_change_is_of_one_service_and_brings_one_address() {
        let (old, new) = (SIZE.address(10, 0, 0).to_string(), SIZE.address(10, 0, 1).to_string());
        for rules in [nftables_change(SIZE), iptables_change(SIZE)] {
            let rules = rules.unwrap();
            assert!(rules.contains(&format!("{new}:8080")) && !rules.contains(&format!("{old}:8080")), "{rules}");
        }
    }
}
