//! What kube-proxy writes in its mode iptables.

use std::fmt::Write as _;

use anyhow::Result;

use super::endpoints;
use crate::{
    lab::{address::Family, manifest::Service},
    traffic::Protocol,
};

/// What there is once.
const BASE: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";

/// Behind all Services.
const LAST: &str = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n";

/// The rules of a family for these Services, in the words of `iptables-restore`.
pub(super) fn rules(family: Family, services: &[Service]) -> Result<String> {
    let mut rules = BASE.to_owned();
    for service in services {
        for protocol in Protocol::ALL {
            rules += &port(family, service, protocol)?;
        }
    }
    Ok(rules + LAST)
}

/// The chains of a Service port, and what leads to them.
fn port(family: Family, service: &Service, protocol: Protocol) -> Result<String> {
    let proto = protocol.to_string().to_lowercase();
    // Names of chains have no more than 28 characters; kube-proxy makes them of a hash.
    let name = format!("{}-{proto}", service.name).to_uppercase();
    let (ip, number, node_port) = (service.cluster_ips.of(family), service.port, service.node_port);
    let to_port = |port: u16| format!("-p {proto} -m {proto} --dport {port}");
    let mut rules = format!(":KUBE-SVC-{name} - [0:0]\n:KUBE-EXT-{name} - [0:0]\n");
    let endpoints = endpoints(service, family);
    let mut left = u32::try_from(endpoints.len())?;
    for (index, endpoint) in endpoints.iter().enumerate() {
        let chain = format!("KUBE-SEP-{name}-{index}");
        let target = std::net::SocketAddr::new(*endpoint, service.target_port);
        let chance = 1.0 / f64::from(left);
        left -= 1;
        writeln!(rules, ":{chain} - [0:0]")?;
        writeln!(rules, "-A {chain} -s {endpoint} -j KUBE-MARK-MASQ")?;
        writeln!(rules, "-A {chain} -p {proto} -m {proto} -j DNAT --to-destination {target}")?;
        writeln!(rules, "-A KUBE-SVC-{name} -m statistic --mode random --probability {chance:.10} -j {chain}")?;
    }
    writeln!(rules, "-A KUBE-EXT-{name} -j KUBE-MARK-MASQ")?;
    writeln!(rules, "-A KUBE-EXT-{name} -j KUBE-SVC-{name}")?;
    writeln!(rules, "-A KUBE-SERVICES -d {ip} {} -j KUBE-SVC-{name}", to_port(number))?;
    writeln!(rules, "-A KUBE-NODEPORTS {} -j KUBE-EXT-{name}", to_port(node_port))?;
    Ok(rules)
}
