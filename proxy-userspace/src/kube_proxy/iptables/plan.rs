//! What of a table goes: text of `iptables-save` in, text for `iptables-restore --noflush` out. Everything that is not named in it stays
//! as it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use super::{
    saved::{SavedRule, SavedTable},
    shape,
};

/// What goes of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The table.
    pub(crate) table: String,
    /// Chains that go, with all their rules.
    pub(crate) chains: Vec<String>,
    /// Rules of the kernel's chains that go, as they are saved.
    pub(crate) rules: Vec<String>,
    /// Chains of kube-proxy's that stay.
    pub(crate) kept: Vec<KeptChain>,
    /// Sets that the rules that stay ask, each with such a rule.
    pub(crate) sets: BTreeMap<String, String>,
    /// The kernel's chain drops what no rule of it accepts, and a chain that goes has accepted for it.
    pub(crate) drops_forwarded: bool,
}

/// A chain that somebody else's rule leads to, or that one which stays needs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KeptChain {
    /// Its name.
    pub(crate) name: String,
    /// The rule, as it is saved.
    pub(crate) because: String,
}

/// Looks through a table.
pub(super) fn plan(table: &SavedTable<'_>) -> Plan {
    let own: BTreeSet<&str> = table.chains.iter().copied().filter(|chain| shape::is_chain(table.name, chain)).collect();
    let is_jump = |rule: &&SavedRule<'_>| shape::is_jump(table.name, rule.source, &rule.words);
    let kept = kept(table, &own);
    let masquerades = kept.iter().any(|chain| chain.name == shape::MARK);
    let goes = |rule: &&SavedRule<'_>| is_jump(rule) && !(masquerades && rule.target() == Some(shape::MASQUERADE));
    let is_kept = |name: &str| kept.iter().any(|chain| chain.name == name);
    let stays = |rule: &&SavedRule<'_>| !goes(rule) && (!own.contains(rule.source) || is_kept(rule.source));
    let sets =
        |rule: &SavedRule<'_>| rule.sets().map(|name| (name.to_owned(), rule.text.to_owned())).collect::<Vec<_>>();
    let rules: Vec<String> = table.rules.iter().filter(goes).map(|rule| rule.text.to_owned()).collect();
    Plan {
        table: table.name.to_owned(),
        chains: own.iter().filter(|name| !is_kept(name)).map(|&name| name.to_owned()).collect(),
        sets: table.rules.iter().filter(stays).flat_map(sets).collect(),
        drops_forwarded: table.dropping.contains(&"FORWARD") && rules.iter().any(|rule| rule.ends_with("KUBE-FORWARD")),
        rules,
        kept,
    }
}

/// Chains of kube-proxy's that rules which stay lead to, and so on from there. A mark that somebody else sets means nothing without the
/// chain that masquerades for it: that stays with the one that marks.
fn kept(table: &SavedTable<'_>, own: &BTreeSet<&str>) -> Vec<KeptChain> {
    let mut kept: Vec<KeptChain> = Vec::new();
    let mut names: BTreeSet<&str> = BTreeSet::new();
    loop {
        let before = names.len();
        for rule in &table.rules {
            let is_foreign = !own.contains(rule.source) && !shape::is_jump(table.name, rule.source, &rule.words);
            let Some(&target) = rule.target().and_then(|target| own.get(target)) else { continue };
            if (is_foreign || names.contains(rule.source)) && names.insert(target) {
                kept.push(KeptChain { name: target.to_owned(), because: rule.text.to_owned() });
            }
        }
        let mark = kept.iter().find(|chain| chain.name == shape::MARK).map(|chain| chain.because.clone());
        if let (Some(because), Some(&masquerade)) = (mark, own.get(shape::MASQUERADE))
            && names.insert(masquerade)
        {
            kept.push(KeptChain { name: masquerade.to_owned(), because });
        }
        if names.len() == before {
            kept.sort();
            return kept;
        }
    }
}

impl Plan {
    /// Nothing goes.
    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.rules.is_empty()
    }

    /// Chains that somebody's own rules hold, others than the pair that masquerades, which plugins of the CNI use by agreement.
    pub(crate) fn held(&self) -> impl Iterator<Item = &KeptChain> {
        self.kept.iter().filter(|chain| ![shape::MARK, shape::MASQUERADE].contains(&chain.name.as_str()))
    }

    /// How many Service ports its chains are of.
    pub(crate) fn services(&self) -> usize {
        self.chains.iter().filter(|chain| shape::is_service(chain)).count()
    }

    /// It is of mode ipvs, which has sets.
    pub(crate) fn is_of_ipvs(&self) -> bool {
        self.chains.iter().any(|chain| chain == shape::NODE_PORTS_OF_IPVS)
    }

    /// What `iptables-restore --noflush` is to be given. To name a chain empties it, so that none is used when it goes.
    pub(super) fn script(&self) -> String {
        let mut script = format!("*{}\n", self.table);
        for chain in &self.chains {
            let _ = writeln!(script, ":{chain} - [0:0]");
        }
        for rule in &self.rules {
            let _ = writeln!(script, "-D{}", rule.strip_prefix("-A").unwrap_or(rule));
        }
        for chain in &self.chains {
            let _ = writeln!(script, "-X {chain}");
        }
        script.push_str("COMMIT\n");
        script
    }
}

#[cfg(test)]
mod tests;
