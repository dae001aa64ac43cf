//! Sets, as `ipset save` prints them.

use std::collections::BTreeSet;

/// Those of kube-proxy for IPv4 (`ipsetInfo` of `pkg/proxy/ipvs/proxier.go`). Names that merely begin alike are others', kube-router's for
/// one.
const NAMES: [&str; 17] = [
    "KUBE-LOOP-BACK",
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-NODE-PORT-TCP",
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-UDP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
];

/// The kernel's longest name of a set.
const LONGEST: usize = 31;

/// Whether a set is kube-proxy's. For IPv6 there is a 6 in the name, which is cut where it becomes too long.
pub(in crate::kube_proxy) fn is_own(name: &str) -> bool {
    let of_ipv6 = |v4: &&str| {
        let name: String = v4.replacen("KUBE-", "KUBE-6-", 1);
        name.chars().take(LONGEST).collect::<String>()
    };
    NAMES.contains(&name) || NAMES.iter().any(|v4| of_ipv6(v4) == name)
}

/// Names of its sets.
pub(super) fn own(saved: &str) -> Vec<String> {
    let names = saved.lines().filter_map(|line| line.strip_prefix("create ")?.split(' ').next());
    names.filter(|name| is_own(name)).map(str::to_owned).collect()
}

/// Protocols and ports of NodePorts.
pub(super) fn node_ports(saved: &str) -> BTreeSet<(&'static str, u16)> {
    saved.lines().filter_map(member).flat_map(|(protocol, ports)| ports.map(move |port| (protocol, port))).collect()
}

/// `add KUBE-NODE-PORT-TCP 30080`; ports that follow each other stand as `30080-30082`, and SCTP's as `192.0.2.1,sctp:30080`.
fn member(line: &str) -> Option<(&'static str, std::ops::RangeInclusive<u16>)> {
    let (set, member) = line.strip_prefix("add ")?.split_once(' ')?;
    let protocol = match set.replacen("KUBE-6-", "KUBE-", 1).as_str() {
        "KUBE-NODE-PORT-TCP" => "TCP",
        "KUBE-NODE-PORT-UDP" => "UDP",
        "KUBE-NODE-PORT-SCTP-HASH" => "SCTP",
        _ => return None,
    };
    let ports = member.split(' ').next()?.rsplit(':').next()?;
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    Some((protocol, first.parse().ok()?..=last.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{is_own, node_ports, own};

    const SAVED: &str = "create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
add KUBE-NODE-PORT-TCP 30080
add KUBE-NODE-PORT-TCP 31000-31002
create KUBE-6-NODE-PORT-UDP bitmap:port range 0-65535
add KUBE-6-NODE-PORT-UDP 30053
create KUBE-NODE-PORT-SCTP-HASH hash:ip,port family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1
add KUBE-NODE-PORT-SCTP-HASH 192.0.2.9,sctp:30132
create KUBE-CLUSTER-IP hash:ip,port family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1
add KUBE-CLUSTER-IP 10.96.0.1,tcp:443
create KUBE-DST-VVJGKX6DC5UJDGTG hash:ip family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1
create KUBE-SRC-MINE hash:ip family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1
";

    #[test]
    fn sets_of_others_are_not_kube_proxys() {
        let expected = ["KUBE-NODE-PORT-TCP", "KUBE-6-NODE-PORT-UDP", "KUBE-NODE-PORT-SCTP-HASH", "KUBE-CLUSTER-IP"];
        assert_eq!(own(SAVED), expected);
        assert!(is_own("KUBE-6-LOAD-BALANCER-SOURCE-CID"), "it is cut");
        assert!(!is_own("KUBE-6-LOAD-BALANCER-SOURCE-CIDR"), "the kernel takes no such name");
    }

    #[test]
    fn node_ports_are_read_out_of_the_sets() {
        let ports: Vec<_> = node_ports(SAVED).into_iter().collect();
        let expected =
            [("SCTP", 30132), ("TCP", 30080), ("TCP", 31000), ("TCP", 31001), ("TCP", 31002), ("UDP", 30053)];
        assert_eq!(ports, expected);
    }
}
