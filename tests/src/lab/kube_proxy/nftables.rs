//! What kube-proxy writes in its mode nftables.

use std::{fmt::Write as _, net::IpAddr};

use anyhow::Result;

use super::endpoints;
use crate::{
    lab::{
        address::{self, Family},
        manifest::Service,
    },
    traffic::Protocol,
};

/// Takes the rules away, in `nft`'s words.
pub(super) const REMOVE: &str = "delete table ip kube-proxy\ndelete table ip6 kube-proxy\n";

/// The rules for these Services, in `nft`'s words.
pub(super) fn rules(services: &[Service]) -> Result<String> {
    let mut rules = String::new();
    for family in Family::ALL {
        rules += &base(family);
        for service in services {
            for protocol in Protocol::ALL {
                rules += &port(family, service, protocol)?;
            }
        }
    }
    Ok(rules)
}

const fn table(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// What there is once in each table.
fn base(family: Family) -> String {
    let (table, kind) = match family {
        Family::V4 => ("ip", "ipv4_addr"),
        Family::V6 => ("ip6", "ipv6_addr"),
    };
    format!(
        "table {table} kube-proxy {{
  comment \"rules for kube-proxy\"
  set cluster-ips {{ type {kind}; comment \"Active ClusterIPs\"; }}
  set nodeport-ips {{ type {kind}; comment \"IPs that accept NodePort traffic\"; }}
  map service-ips {{ type {kind} . inet_proto . inet_service : verdict; }}
  map service-nodeports {{ type inet_proto . inet_service : verdict; }}
  chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
  chain masquerading {{
    meta mark & 0x4000 == 0 return
    meta mark set meta mark xor 0x4000
    masquerade fully-random
  }}
  chain services {{
    {table} daddr . meta l4proto . th dport vmap @service-ips
    {table} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
}}
"
    )
}

/// The chains of a Service port, and what leads to them.
fn port(family: Family, service: &Service, protocol: Protocol) -> Result<String> {
    let (table, proto) = (table(family), protocol.to_string().to_lowercase());
    let name = format!("service-{}-{proto}", service.name);
    let (ip, number, node_port) = (service.cluster_ips.of(family), service.port, service.node_port);
    let mut rules = String::new();
    let endpoints = endpoints(service, family);
    let add = format!("add rule {table} kube-proxy");
    for (index, endpoint) in endpoints.iter().enumerate() {
        let target = match endpoint {
            IpAddr::V4(v4) => format!("{v4}:{}", service.target_port),
            IpAddr::V6(v6) => format!("[{v6}]:{}", service.target_port),
        };
        writeln!(rules, "add chain {table} kube-proxy endpoint-{index}-{name}")?;
        writeln!(rules, "{add} endpoint-{index}-{name} {table} saddr {endpoint} jump mark-for-masquerade")?;
        writeln!(rules, "{add} endpoint-{index}-{name} meta l4proto {proto} dnat to {target}")?;
    }
    let chances: Vec<String> =
        (0..endpoints.len()).map(|index| format!("{index} : goto endpoint-{index}-{name}")).collect();
    writeln!(rules, "add chain {table} kube-proxy {name}")?;
    writeln!(rules, "{add} {name} numgen random mod {} vmap {{ {} }}", endpoints.len(), chances.join(", "))?;
    writeln!(rules, "add chain {table} kube-proxy external-{name}")?;
    writeln!(rules, "{add} external-{name} jump mark-for-masquerade")?;
    writeln!(rules, "{add} external-{name} goto {name}")?;
    writeln!(rules, "add element {table} kube-proxy cluster-ips {{ {ip} }}")?;
    for node in address::NODES {
        let own = address::on_wire(node.host).of(family);
        writeln!(rules, "add element {table} kube-proxy nodeport-ips {{ {own} }}")?;
    }
    writeln!(rules, "add element {table} kube-proxy service-ips {{ {ip} . {proto} . {number} : goto {name} }}")?;
    writeln!(
        rules,
        "add element {table} kube-proxy service-nodeports {{ {proto} . {node_port} : goto external-{name} }}"
    )?;
    Ok(rules)
}
