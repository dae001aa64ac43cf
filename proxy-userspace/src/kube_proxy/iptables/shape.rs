//! What kube-proxy calls its own in the tables of iptables. Evidence: `CleanupLeftovers` and its tables of chains and jumps in
//! `pkg/proxy/iptables` and `pkg/proxy/ipvs` of kubernetes 1.13 to 1.36.
//!
//! The kubelet's are not: `KUBE-FIREWALL` of table filter, `KUBE-KUBELET-CANARY`, `KUBE-IPTABLES-HINT`, `KUBE-MARK-DROP`; nor are those of
//! others whose names begin alike, like kube-router's `KUBE-ROUTER-…`, `KUBE-POD-FW-…` and `KUBE-NWPLCY-…`.

/// The chain that marks a packet for the one below.
pub(super) const MARK: &str = "KUBE-MARK-MASQ";
/// The chain that masquerades what is marked.
pub(super) const MASQUERADE: &str = "KUBE-POSTROUTING";

/// In mode ipvs there is always one in table nat, and in newer versions one in table filter.
pub(super) const NODE_PORTS_OF_IPVS: &str = "KUBE-NODE-PORT";

/// Kept in every table to notice when somebody has flushed it.
const CANARY: &str = "KUBE-PROXY-CANARY";

const NAT: [&str; 8] = [
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    MASQUERADE,
    MARK,
    // Of mode ipvs.
    NODE_PORTS_OF_IPVS,
    "KUBE-LOAD-BALANCER",
    // Of mode ipvs until 1.24. The kubelet's chain of this name is in table filter.
    "KUBE-FIREWALL",
    CANARY,
];

const FILTER: [&str; 10] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    // Of mode ipvs.
    NODE_PORTS_OF_IPVS,
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    CANARY,
];

/// Chains of a Service port or an endpoint: behind the prefix are sixteen letters and digits of a hash in base 32.
const HASHED: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];
const HASH: usize = 16;

/// A rule that leads from a chain of the kernel's to one of kube-proxy's.
struct Jump {
    table: &'static str,
    sources: &'static [&'static str],
    target: &'static str,
    comment: &'static str,
}

const JUMPS: [Jump; 11] = [
    Jump {
        table: "nat",
        sources: &["PREROUTING", "OUTPUT"],
        target: "KUBE-SERVICES",
        comment: "kubernetes service portals",
    },
    Jump { table: "nat", sources: &["POSTROUTING"], target: MASQUERADE, comment: "kubernetes postrouting rules" },
    Jump {
        table: "filter",
        sources: &["INPUT", "FORWARD", "OUTPUT"],
        target: "KUBE-SERVICES",
        comment: "kubernetes service portals",
    },
    Jump {
        table: "filter",
        sources: &["INPUT", "FORWARD"],
        target: "KUBE-EXTERNAL-SERVICES",
        comment: "kubernetes externally-visible service portals",
    },
    Jump {
        table: "filter",
        sources: &["INPUT"],
        target: "KUBE-NODEPORTS",
        comment: "kubernetes health check service ports",
    },
    Jump { table: "filter", sources: &["FORWARD"], target: "KUBE-FORWARD", comment: "kubernetes forwarding rules" },
    Jump {
        table: "filter",
        sources: &["INPUT", "FORWARD", "OUTPUT"],
        target: "KUBE-PROXY-FIREWALL",
        comment: "kubernetes load balancer firewall",
    },
    Jump { table: "filter", sources: &["INPUT"], target: "KUBE-NODE-PORT", comment: "kubernetes health check rules" },
    Jump {
        table: "filter",
        sources: &["INPUT", "FORWARD"],
        target: "KUBE-PROXY-FIREWALL",
        comment: "kube-proxy firewall rules",
    },
    Jump { table: "filter", sources: &["INPUT"], target: "KUBE-IPVS-FILTER", comment: "kubernetes ipvs access filter" },
    Jump {
        table: "filter",
        sources: &["OUTPUT"],
        target: "KUBE-IPVS-OUT-FILTER",
        comment: "kubernetes ipvs access filter",
    },
];

/// Tables of iptables that kube-proxy writes to.
pub(super) const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// Whether a chain of one of its tables is kube-proxy's.
pub(super) fn is_chain(table: &str, chain: &str) -> bool {
    match table {
        "nat" => NAT.contains(&chain) || is_hashed(chain),
        "filter" => FILTER.contains(&chain),
        "mangle" => chain == CANARY,
        _ => false,
    }
}

/// Whether it is that of a Service port: there is one for each that has endpoints, `KUBE-SVL-` besides where policies are Local.
pub(super) fn is_service(chain: &str) -> bool {
    chain.starts_with("KUBE-SVC-")
}

fn is_hashed(chain: &str) -> bool {
    let is_base32 = |letter: u8| letter.is_ascii_uppercase() || (b'2'..=b'7').contains(&letter);
    let hash = HASHED.iter().find_map(|prefix| chain.strip_prefix(prefix));
    hash.is_some_and(|hash| hash.len() == HASH && hash.bytes().all(is_base32))
}

/// Whether a rule is a jump that kube-proxy has written, word for word; `words` are those behind the name of its chain.
pub(super) fn is_jump(table: &str, source: &str, words: &[String]) -> bool {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let words = words.strip_prefix(&["-m", "conntrack", "--ctstate", "NEW"]).unwrap_or(&words);
    let ["-m", "comment", "--comment", comment, "-j", target] = words else { return false };
    JUMPS.iter().any(|jump| {
        jump.table == table && jump.sources.contains(&source) && jump.target == *target && jump.comment == *comment
    })
}

#[cfg(test)]
mod tests {
    use super::{is_chain, is_jump};

    #[test]
    fn chains_of_others_whose_names_begin_alike_are_not_kube_proxys() {
        let own = [
            ("nat", "KUBE-SVC-ERIFXISQEP7F7OF4"),
            ("nat", "KUBE-SEP-UKSFD7AGPMPPLUHC"),
            ("nat", "KUBE-MARK-MASQ"),
            ("filter", "KUBE-FORWARD"),
            ("mangle", "KUBE-PROXY-CANARY"),
        ];
        let foreign = [
            ("nat", "KUBE-MARK-DROP"),
            ("nat", "KUBE-KUBELET-CANARY"),
            ("nat", "KUBE-SVC-MINE"),
            ("nat", "KUBE-HOSTPORTS"),
            ("filter", "KUBE-FIREWALL"),
            ("filter", "KUBE-ROUTER-INPUT"),
            ("filter", "KUBE-POD-FW-UKSFD7AGPMPPLUHC"),
            ("filter", "KUBE-SVC-ERIFXISQEP7F7OF4"),
            ("mangle", "KUBE-IPTABLES-HINT"),
            ("raw", "KUBE-SERVICES"),
        ];
        assert!(own.iter().all(|(table, chain)| is_chain(table, chain)), "{own:?}");
        for (table, chain) in foreign {
            assert!(!is_chain(table, chain), "{table} {chain}");
        }
    }

    #[test]
    fn a_jump_is_kube_proxys_only_if_every_word_is() {
        let is_jump = |rule: &str| {
            let words: Vec<String> = rule.split('|').map(str::to_owned).collect();
            is_jump("filter", &words[0], &words[1..])
        };
        assert!(is_jump("FORWARD|-m|comment|--comment|kubernetes forwarding rules|-j|KUBE-FORWARD"));
        assert!(is_jump(
            "INPUT|-m|conntrack|--ctstate|NEW|-m|comment|--comment|kubernetes service portals|-j|KUBE-SERVICES"
        ));
        let foreign = [
            "FORWARD|-m|comment|--comment|ours|-j|KUBE-FORWARD",
            "FORWARD|-j|KUBE-FORWARD",
            "FORWARD|-i|eth0|-m|comment|--comment|kubernetes forwarding rules|-j|KUBE-FORWARD",
            "INPUT|-m|comment|--comment|kubernetes forwarding rules|-j|KUBE-FORWARD",
            "FORWARD|-m|comment|--comment|kubernetes forwarding rules|-j|ACCEPT",
        ];
        for rule in foreign {
            assert!(!is_jump(rule), "{rule}");
        }
    }
}
