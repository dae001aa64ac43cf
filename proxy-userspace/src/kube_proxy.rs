//! What kube-proxy has put into the kernel of this node, in any of its modes, and how it is taken out again: its things and nothing else,
//! a table at once. In: the network namespace of the calling thread. Out: [`Found`], which says what there is before anything is changed,
//! and [`Report`], what was done.

mod iptables;
mod ipvs;
mod nftables;
mod process;
mod tool;

use std::{collections::BTreeMap, fmt, io};

use serde::Serialize;

pub use self::process::{Process, process};
use crate::dataplane::{
    Finding, Verdict,
    netlink::{SERVICE_DEVICE, conntrack, netfilter},
};

/// IP's versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }

    fn iptables(self) -> &'static str {
        match self {
            Self::Ipv4 => "iptables",
            Self::Ipv6 => "ip6tables",
        }
    }
}

/// Something of kube-proxy's in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trace {
    /// What holds it: `nftables`, `iptables-nft`, `iptables-legacy`, `ipvs`, `ipset` or `link`.
    pub mechanism: &'static str,
    /// Of which family; none where a thing is of both, or its name tells.
    pub family: Option<Family>,
    /// The table it is in, or is.
    pub table: Option<String>,
    /// What: `table`, `chains`, `rules`, `services`, `set` or `device`.
    pub kind: &'static str,
    /// Names of chains, rules as `iptables-save` has them, services, the set or the device.
    pub items: Vec<String>,
}

/// A chain or a set of kube-proxy's that stays, because somebody else uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Its name, and where it is.
    pub what: String,
    /// The rule that needs it, as `iptables-save` has it.
    pub because: String,
}

/// Everything that was found. Nothing is changed yet.
#[derive(Debug, Default)]
pub struct Found {
    nftables: Vec<nftables::Piece>,
    iptables: Vec<iptables::Piece>,
    ipvs: ipvs::Found,
    problems: Vec<String>,
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What goes.
    pub removed: Vec<Trace>,
    /// What stays.
    pub kept: Vec<Kept>,
    /// What the removal means for others, and what could not be seen.
    pub notes: Vec<String>,
    /// What could not be looked at or removed, and what to do about it.
    pub problems: Vec<String>,
}

/// One thing to do.
enum Step<'a> {
    NftTable(&'a nftables::Piece),
    Iptables(&'a iptables::Piece),
    VirtualServices(&'a [ipvs::VirtualService]),
    Device(u32),
    Set(&'a str),
}

/// Looks for all of it. Must not be called in a tokio runtime.
pub fn find() -> Found {
    let mut found = Found::default();
    match netfilter::tables().and_then(|tables| Ok((tables, netfilter::chains()?))) {
        Ok((tables, chains)) => {
            found.nftables = nftables::find(&tables, &chains);
            (found.iptables, found.problems) = iptables::find(&chains);
        }
        Err(error) => {
            (found.iptables, found.problems) = iptables::find(&[]);
            found.problems.push(format!("the tables of nftables cannot be listed: {error}"));
        }
    }
    let is_of_ipvs = found.iptables.iter().any(|piece| piece.plan.is_of_ipvs());
    found.ipvs = ipvs::find(is_of_ipvs || found.sets_asked().keys().any(|name| ipvs::is_set(name)));
    found.problems.append(&mut found.ipvs.problems);
    found
}

/// What `sluice check` says of it. Must not be called in a tokio runtime.
pub fn finding() -> Finding {
    let (found, subject) = (find(), "kube-proxy");
    let modes = found.modes().join(", ");
    let runs = matches!(process(), Process::Runs(_));
    match (modes.is_empty(), runs, found.problems()) {
        (true, false, []) => {
            Finding { subject, verdict: Verdict::Good, found: "none".into(), advice: String::new() }
        }
        (true, false, problems) => {
            Finding { subject, verdict: Verdict::Fallback, found: "not known".into(), advice: problems.join("; ") }
        }
        (_, true, _) => Finding {
            subject,
            verdict: Verdict::Fallback,
            found: if modes.is_empty() { "runs".into() } else { format!("runs, mode {modes}") },
            advice: "Sluice's programs see packets before its rules do: keep its pod off this node, and when connections that it has \
                     translated have ended, sluice cleanup --kube-proxy"
                .into(),
        },
        (false, false, _) => Finding {
            subject,
            verdict: Verdict::Fallback,
            found: format!("does not run, but its rules are here, mode {modes}"),
            advice: "when connections that it has translated have ended: sluice cleanup --kube-proxy".into(),
        },
    }
}

/// How many connections end when rules or virtual services go.
pub fn connections(found: &Found) -> io::Result<usize> {
    let has_rules = !found.nftables.is_empty() || found.iptables.iter().any(|piece| !piece.plan.is_empty());
    let translated = if has_rules { conntrack::translated()?.len() } else { 0 };
    Ok(translated + found.ipvs.connections)
}

impl Found {
    /// Nothing is to be removed, as far as could be seen.
    pub fn is_empty(&self) -> bool {
        self.steps().is_empty()
    }

    /// What could not be looked at, with advice.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The modes that it is of, each with how many Service ports there are: `iptables (Service ports: 12)`. A Service port of both
    /// families counts as two.
    pub fn modes(&self) -> Vec<String> {
        let told = |mode: &str, count: usize| format!("{mode} (Service ports: {count})");
        let mut modes = Vec::new();
        if !self.nftables.is_empty() {
            modes.push(told("nftables", self.nftables.iter().map(nftables::Piece::services).sum()));
        }
        if !self.ipvs.services.is_empty() || self.ipvs.device.is_some() {
            modes.push(told("ipvs", self.ipvs.services.len()));
        }
        let chains = || self.iptables.iter().filter(|piece| !piece.plan.is_empty());
        let services = chains().map(|piece| piece.plan.services()).sum();
        if services > 0 || modes.is_empty() && chains().next().is_some() {
            modes.push(told("iptables", services));
        }
        modes
    }

    /// What it would come to.
    pub fn plan(&self) -> Report {
        Report { removed: self.steps().iter().flat_map(Step::traces).collect(), ..self.aside() }
    }

    /// Takes everything out. What fails does not keep the rest from being tried.
    pub fn remove(&self) -> Report {
        let mut report = self.aside();
        for step in self.steps() {
            match step.carry_out() {
                Ok(()) => report.removed.extend(step.traces()),
                Err(problem) => report.problems.push(problem),
            }
        }
        report
    }

    /// Sets go after the rules that ask them, the device after what is served at its addresses.
    fn steps(&self) -> Vec<Step<'_>> {
        let mut steps: Vec<Step<'_>> = self.nftables.iter().map(Step::NftTable).collect();
        steps.extend(self.iptables.iter().filter(|piece| !piece.plan.is_empty()).map(Step::Iptables));
        if !self.ipvs.services.is_empty() {
            steps.push(Step::VirtualServices(&self.ipvs.services));
        }
        steps.extend(self.ipvs.device.iter().map(|(index, _)| Step::Device(*index)));
        let asked = self.sets_asked();
        steps.extend(
            self.ipvs.sets.iter().filter(|name| !asked.contains_key(name.as_str())).map(|name| Step::Set(name)),
        );
        steps
    }

    /// Sets that rules which stay ask, each with such a rule.
    fn sets_asked(&self) -> BTreeMap<&str, &str> {
        let asked = self.iptables.iter().flat_map(|piece| &piece.plan.sets);
        asked.map(|(name, rule)| (name.as_str(), rule.as_str())).collect()
    }

    /// All but what is removed.
    fn aside(&self) -> Report {
        let mut report = Report { problems: self.problems.clone(), ..Report::default() };
        for piece in &self.iptables {
            for chain in &piece.plan.kept {
                let what = format!("chain {} of {}", chain.name, piece.place());
                report.kept.push(Kept { what, because: chain.because.clone() });
            }
            for chain in piece.plan.held() {
                report.problems.push(format!(
                    "chain {} of {} stays, because a rule that is not kube-proxy's leads to it: remove that rule (`{}`) and try again",
                    chain.name,
                    piece.place(),
                    chain.because,
                ));
            }
            if piece.plan.drops_forwarded {
                report.notes.push(format!(
                    "the policy of FORWARD in {} is DROP: what only KUBE-FORWARD has accepted is dropped from then on; the CNI's rules \
                     must accept what pods send and get",
                    piece.place(),
                ));
            }
        }
        for (name, because) in self.sets_asked() {
            if self.ipvs.sets.iter().any(|own| own == name) {
                report.kept.push(Kept { what: format!("set {name}"), because: because.to_owned() });
            }
        }
        if self.ipvs.foreign > 0 && self.ipvs.device.is_some() {
            report.notes.push(format!("{} virtual services of IPVS are not kube-proxy's, and stay", self.ipvs.foreign));
        }
        report
    }
}

impl Step<'_> {
    fn traces(&self) -> Vec<Trace> {
        let beside = |mechanism, kind, items| Trace { mechanism, family: None, table: None, kind, items };
        match self {
            Self::NftTable(piece) => vec![Trace {
                mechanism: "nftables",
                family: Some(piece.family),
                table: Some(nftables::TABLE.to_owned()),
                kind: "table",
                items: piece.chains.clone(),
            }],
            Self::Iptables(piece) => {
                let trace = |kind, items: &Vec<String>| Trace {
                    mechanism: piece.backend.name(),
                    family: Some(piece.family),
                    table: Some(piece.plan.table.clone()),
                    kind,
                    items: items.clone(),
                };
                let both = [trace("rules", &piece.plan.rules), trace("chains", &piece.plan.chains)];
                both.into_iter().filter(|trace| !trace.items.is_empty()).collect()
            }
            Self::VirtualServices(services) => {
                vec![beside("ipvs", "services", services.iter().map(ToString::to_string).collect())]
            }
            Self::Device(_) => vec![beside("link", "device", vec![SERVICE_DEVICE.to_owned()])],
            Self::Set(name) => vec![beside("ipset", "set", vec![(*name).to_owned()])],
        }
    }

    fn carry_out(&self) -> Result<(), String> {
        match self {
            Self::NftTable(piece) => piece.remove(),
            Self::Iptables(piece) => piece.remove(),
            Self::VirtualServices(services) => ipvs::remove_services(services),
            Self::Device(index) => ipvs::remove_device(*index),
            Self::Set(name) => ipvs::remove_set(name),
        }
    }
}

impl fmt::Display for Trace {
    /// `12 chains: KUBE-A, KUBE-B, KUBE-C and 9 more`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        let shown = self.items.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        match (self.kind, self.items.len()) {
            ("table", count) => write!(f, "the table, with {count} chains"),
            ("set" | "device", _) => write!(f, "{} {shown}", self.kind),
            ("rules", _) | (_, ..=SHOWN) => f.write_str(&shown),
            (kind, count) => write!(f, "{count} {kind}: {shown} and {} more", count - SHOWN),
        }
    }
}
