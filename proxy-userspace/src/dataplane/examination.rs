//! What `sluice check` looks at: all that an agent needs of a node, one thing after the other, with what it does without. Nothing is
//! changed; programs and maps that are loaded to see whether the kernel takes them are gone afterwards.

use std::{fs, path::Path};

use caps::{CapSet, Capability};
use serde::Serialize;

use super::{
    error::OpenError,
    load,
    netlink::NodeNetwork,
    options::{Options, SocketLb},
    preflight,
    select::select,
};

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub subject: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it, or what happens instead; empty where all is well.
    pub advice: String,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// The agent runs, and does without.
    Fallback,
    /// The agent does not start.
    Missing,
}

impl Verdict {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Fallback => "fallback",
            Self::Missing => "missing",
        }
    }
}

/// Looks at everything. What an agent of this very executable, whose process is named, has in the kernel, is not loaded once more.
pub fn examine(options: &Options, network: Result<&NodeNetwork, String>, own_agent: Option<u32>) -> Vec<Finding> {
    let mut findings = vec![kernel()];
    findings.extend(preflight::CAPABILITIES.map(capability));
    findings.extend([btf(), bpf_file_system(options), cgroup(options), programs(options, own_agent)]);
    findings.extend([tcx(), jit(), writable_sysctls()]);
    findings.extend(["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"].map(forwarding));
    findings.extend(match network {
        Ok(network) => vec![uplinks(options, network), pod_devices(options, network)],
        Err(reason) => vec![fallback("devices", reason, "without netlink no device is found, and nothing is attached")],
    });
    findings
}

fn good(subject: &'static str, found: impl Into<String>) -> Finding {
    Finding { subject, verdict: Verdict::Good, found: found.into(), advice: String::new() }
}

fn fallback(subject: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { subject, verdict: Verdict::Fallback, found: found.into(), advice: advice.into() }
}

/// The error's text says what to do.
fn missing(subject: &'static str, error: &OpenError) -> Finding {
    Finding { subject, verdict: Verdict::Missing, found: "no".into(), advice: error.to_string() }
}

fn kernel() -> Finding {
    let release = preflight::release();
    match preflight::kernel(&release) {
        Ok(()) => good("kernel 6.1 or later", release),
        Err(error) => missing("kernel 6.1 or later", &error),
    }
}

fn capability(capability: Capability) -> Finding {
    let subject = match capability {
        Capability::CAP_BPF => "capability BPF",
        Capability::CAP_NET_ADMIN => "capability NET_ADMIN",
        _ => "capability PERFMON",
    };
    if preflight::has(capability) {
        let has_own = caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
        good(subject, if has_own { "yes" } else { "by SYS_ADMIN" })
    } else {
        missing(subject, &OpenError::NoCapability { capability })
    }
}

fn btf() -> Finding {
    let subject = "type information of the kernel";
    if Path::new(preflight::BTF).exists() {
        good(subject, preflight::BTF)
    } else {
        missing(subject, &OpenError::NoBtf { path: preflight::BTF.into() })
    }
}

fn bpf_file_system(options: &Options) -> Finding {
    let subject = "BPF file system";
    match preflight::find_bpf_file_system(&options.pin_path) {
        Ok(Some(path)) => fallback(subject, "not mounted", format!("the agent mounts it at {}", path.display())),
        Ok(None) => good(subject, options.pin_path.display().to_string()),
        Err(error) => missing(subject, &error),
    }
}

fn cgroup(options: &Options) -> Finding {
    let subject = "cgroup v2";
    if options.socket_lb == SocketLb::Off {
        return good(subject, "not needed: --socket-lb=off");
    }
    match preflight::cgroup(options.cgroup.as_deref()) {
        Ok(path) => good(subject, path.display().to_string()),
        Err(error) => missing(subject, &error),
    }
}

fn programs(options: &Options, own_agent: Option<u32>) -> Finding {
    let subject = "programs";
    if let Some(process) = own_agent {
        return good(subject, format!("at work, kept by process {process} of this executable; --load tries all again"));
    }
    if !preflight::CAPABILITIES.into_iter().all(preflight::has) {
        return fallback(subject, "not tried", "whether the kernel takes them is seen with the capabilities above");
    }
    match load::rehearse(options) {
        Ok(count) => good(subject, format!("the kernel takes all {count}")),
        Err(error) => missing(subject, &error),
    }
}

fn tcx() -> Finding {
    let subject = "TCX";
    if preflight::kernel_is_at_least((6, 6)) {
        good(subject, "yes")
    } else {
        fallback(subject, "needs Linux 6.6", "programs are filters of a clsact qdisc, which others may remove")
    }
}

fn jit() -> Finding {
    let subject = "JIT compiler";
    match fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").as_deref().map(str::trim_ascii) {
        Ok("0") => {
            fallback(subject, "off", "programs are interpreted, many times slower: sysctl net.core.bpf_jit_enable=1")
        }
        _ => good(subject, "on"),
    }
}

fn writable_sysctls() -> Finding {
    let subject = "reserved source ports";
    let path = "/proc/sys/net/ipv4/ip_local_reserved_ports";
    match rustix::fs::access(path, rustix::fs::Access::WRITE_OK) {
        Ok(()) => good(subject, "can be set"),
        Err(_) => fallback(
            subject,
            "/proc/sys cannot be written",
            "sockets of the node may take ports that masqueraded flows use: on the node run `sysctl -w net.ipv4.ip_local_reserved_ports=` with \
             those of --source-port-range, besides what stands there",
        ),
    }
}

fn forwarding(sysctl: &'static str) -> Finding {
    let subject = if sysctl.contains("ipv4") { "forwarding of IPv4" } else { "forwarding of IPv6" };
    match fs::read_to_string(Path::new("/proc/sys").join(sysctl)).as_deref().map(str::trim_ascii) {
        Ok("0") | Err(_) => fallback(
            subject,
            "off",
            format!("pods and backends elsewhere are not reached: sysctl {}=1", sysctl.replace('/', ".")),
        ),
        Ok(_) => good(subject, "on"),
    }
}

fn uplinks(options: &Options, network: &NodeNetwork) -> Finding {
    let devices: Vec<&str> = select(options, network).uplinks.iter().map(|link| link.name.as_str()).collect();
    if devices.is_empty() {
        return fallback("uplinks", "none", "nobody outside is served: name them by --uplinks");
    }
    good("uplinks", devices.join(" "))
}

fn pod_devices(options: &Options, network: &NodeNetwork) -> Finding {
    match select(options, network).pod_devices.as_slice() {
        [] => fallback("pod devices", "none yet", "pods are served as their devices appear: see --pod-devices"),
        [only] => good("pod devices", only.name.clone()),
        [first, others @ ..] => good("pod devices", format!("{} and {} more", first.name, others.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::{Options, Verdict, examine};

    #[test]
    fn everything_that_is_not_good_says_what_to_do() {
        let mut options = Options::new("/etc/sluice-pins");
        options.cgroup = Some("/etc".into());
        let findings = examine(&options, Err("no netlink".into()), None);
        for finding in &findings {
            assert_eq!(finding.verdict == Verdict::Good, finding.advice.is_empty(), "{finding:?}");
        }
        let is_missing = |subject| findings.iter().any(|f| f.subject == subject && f.verdict == Verdict::Missing);
        assert!(is_missing("BPF file system") && is_missing("cgroup v2"), "{findings:?}");
    }
}
