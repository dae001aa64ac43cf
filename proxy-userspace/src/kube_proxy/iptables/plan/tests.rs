use super::{super::saved, Plan, plan};

/// Lines that begin with a tab are kube-proxy's.
const NODE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/kube-proxy/iptables.rules"));
const IPVS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/kube-proxy/ipvs.rules"));

fn with_kube_proxy(node: &str) -> String {
    node.replace('\t', "")
}

fn without_kube_proxy(node: &str) -> String {
    node.lines().filter(|line| !line.starts_with('\t')).map(|line| line.to_owned() + "\n").collect()
}

fn plans(text: &str) -> Vec<Plan> {
    saved::parse(text).iter().map(plan).collect()
}

fn plan_of(text: &str, table: &str) -> Plan {
    plans(text).into_iter().find(|plan| plan.table == table).unwrap()
}

/// Does to a saved text what `iptables-restore --noflush` does to the kernel. Fails where that would.
fn apply(text: &str, scripts: impl IntoIterator<Item = String>) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    for script in scripts {
        let table = script.lines().next().unwrap().to_owned();
        let begin = lines.iter().position(|line| *line == table).unwrap();
        let end = begin + lines[begin..].iter().position(|line| line == "COMMIT").unwrap();
        let mut own: Vec<String> = lines.drain(begin..end).collect();
        for order in script.lines().skip(1).filter(|order| *order != "COMMIT") {
            carry_out(&mut own, order);
        }
        lines.splice(begin..begin, own);
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

fn carry_out(lines: &mut Vec<String>, order: &str) {
    if let Some(chain) = order.strip_prefix(':') {
        let chain = chain.split(' ').next().unwrap();
        lines.retain(|line| !line.starts_with(&format!("-A {chain} ")));
    } else if let Some(rule) = order.strip_prefix("-D") {
        let at = lines.iter().position(|line| *line == format!("-A{rule}"));
        lines.remove(at.unwrap_or_else(|| panic!("no such rule: {rule}")));
    } else if let Some(chain) = order.strip_prefix("-X ") {
        let is_used = |line: &String| line.starts_with("-A") && line.ends_with(&format!(" -j {chain}"));
        assert!(!lines.iter().any(is_used), "{chain} is used");
        let at = lines.iter().position(|line| line.starts_with(&format!(":{chain} "))).unwrap();
        lines.remove(at);
    } else {
        panic!("not understood: {order}");
    }
}

fn cleaned(text: &str) -> String {
    apply(text, plans(text).iter().filter(|plan| !plan.is_empty()).map(Plan::script))
}

#[test]
fn what_is_not_kube_proxys_stays_byte_for_byte() {
    for node in [NODE, IPVS] {
        assert_eq!(cleaned(&with_kube_proxy(node)), without_kube_proxy(node));
    }
}

#[test]
fn where_there_is_nothing_of_kube_proxys_nothing_goes() {
    for node in [NODE, IPVS] {
        let text = without_kube_proxy(node);
        for plan in plans(&text) {
            assert!(plan.is_empty() && plan.kept.is_empty(), "{plan:?}");
        }
    }
}

#[test]
fn services_are_counted_once_for_each_port() {
    assert_eq!(plan_of(&with_kube_proxy(NODE), "nat").services(), 1);
}

/// Of the pair that masquerades.
const PAIR: [&str; 5] = [
    "\t:KUBE-MARK-MASQ ",
    "\t:KUBE-POSTROUTING ",
    "\t-A POSTROUTING ",
    "\t-A KUBE-MARK-MASQ ",
    "\t-A KUBE-POSTROUTING ",
];

/// portmap does this where its `externalSetMarkChain` says so.
#[test]
fn the_chains_that_masquerade_stay_as_long_as_somebody_marks_for_them() {
    const USE: &str = "-A CNI-DN-1a2b3c4d5e6f708192a3b -s 10.244.1.0/24 -p tcp -m tcp --dport 8080 -j ";
    let node = NODE.replace(&format!("{USE}CNI-HOSTPORT-SETMARK"), &format!("{USE}KUBE-MARK-MASQ"));
    let plan = plan_of(&with_kube_proxy(&node), "nat");
    let kept: Vec<&str> = plan.kept.iter().map(|kept| kept.name.as_str()).collect();
    assert_eq!(kept, ["KUBE-MARK-MASQ", "KUBE-POSTROUTING"]);
    assert_eq!(plan.held().count(), 0);
    let after = cleaned(&with_kube_proxy(&node));
    let stays = |line: &&str| !line.starts_with('\t') || PAIR.iter().any(|prefix| line.starts_with(prefix));
    let expected: Vec<&str> = node.lines().filter(stays).map(str::trim_start).collect();
    assert_eq!(after.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_chain_that_a_foreign_rule_leads_to_stays_with_all_it_leads_to() {
    let (foreign, next) = ("-A FORWARD -i wg0 -j KUBE-SERVICES", "-A FORWARD -m conntrack --ctstate RELATED");
    let node = NODE.replace(next, &format!("{foreign}\n{next}"));
    let text = with_kube_proxy(&node);
    let plan = plan_of(&text, "filter");
    let held: Vec<_> = plan.held().map(|kept| (kept.name.as_str(), kept.because.as_str())).collect();
    assert_eq!(held, [("KUBE-SERVICES", foreign)]);
    let after = cleaned(&text);
    assert!(after.contains(foreign) && after.contains("shop/empty has no endpoints"), "{after}");
    assert!(!after.contains("--ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES"));
    // The same in table nat, where it leads further.
    let node = NODE.replace("-A OPERATOR -d 192.0.2.77/32 -j RETURN", "-A OPERATOR -g KUBE-SVC-3AFJMPBNX6ZOLL42");
    let plan = plan_of(&with_kube_proxy(&node), "nat");
    let held: Vec<_> = plan.held().map(|kept| kept.name.as_str()).collect();
    assert_eq!(held, ["KUBE-SEP-7GY6IKFW2ZVTQ3EA", "KUBE-SEP-XOLKHWDQ5BPCSN24", "KUBE-SVC-3AFJMPBNX6ZOLL42"]);
    assert!(plan.kept.iter().any(|kept| kept.name == "KUBE-POSTROUTING"), "{:?}", plan.kept);
}

#[test]
fn it_is_told_that_forwarding_was_accepted_by_kube_proxys_chain() {
    let text = with_kube_proxy(NODE);
    assert!(plan_of(&text, "filter").drops_forwarded);
    assert!(!plan_of(&text.replace(":FORWARD DROP", ":FORWARD ACCEPT"), "filter").drops_forwarded);
    assert!(!plan_of(&without_kube_proxy(NODE), "filter").drops_forwarded);
}

#[test]
fn sets_that_rules_which_stay_ask_are_known() {
    let text = with_kube_proxy(IPVS);
    let asked = |table| plan_of(&text, table).sets.into_keys().collect::<Vec<_>>();
    assert_eq!(asked("filter"), ["OPERATOR-ALLOWED"]);
    let foreign = text.replace("OPERATOR-ALLOWED src", "KUBE-CLUSTER-IP dst,dst");
    assert_eq!(plan_of(&foreign, "filter").sets.into_keys().collect::<Vec<_>>(), ["KUBE-CLUSTER-IP"]);
}
