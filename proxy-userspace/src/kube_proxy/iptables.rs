//! kube-proxy's chains and jumps in the tables of iptables, of both backends and both families: read by `iptables-save`, removed by
//! `iptables-restore --noflush`, a table at once.

mod plan;
mod saved;
mod shape;

use std::fs;

use netlink_packet_netfilter::NetfilterProtoFamily;
use serde::Serialize;

pub(super) use self::plan::Plan;
use super::{
    Family,
    tool::{self, ToolError},
};
use crate::dataplane::netlink::netfilter::Chain;

/// Seconds to wait for others that change the same tables.
const WAIT: &str = "--wait=10";

/// Which of the kernel's two kinds of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Backend {
    /// Tables of nftables.
    #[serde(rename = "iptables-nft")]
    Nft,
    /// Tables of their own.
    #[serde(rename = "iptables-legacy")]
    Legacy,
}

/// What goes of one backend's table of one family.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) backend: Backend,
    pub(super) family: Family,
    /// The program that is given the plan.
    restore: String,
    pub(super) plan: Plan,
}

impl Backend {
    /// As its programs are called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nft => "iptables-nft",
            Self::Legacy => "iptables-legacy",
        }
    }

    /// How a program that serves only one backend says which.
    fn is_of(self, version: &str) -> bool {
        match self {
            Self::Nft => version.contains("nf_tables"),
            // Before 1.8 there was nothing else to say.
            Self::Legacy => !version.contains("nf_tables"),
        }
    }

    /// Whether the kernel holds anything that may be kube-proxy's: of nftables it tells by itself what chains there are.
    fn may_hold(self, family: Family, chains: &[Chain]) -> bool {
        match self {
            Self::Nft => chains.iter().any(|chain| is_own(family, chain)),
            Self::Legacy => {
                let list = match family {
                    Family::Ipv4 => "/proc/self/net/ip_tables_names",
                    Family::Ipv6 => "/proc/self/net/ip6_tables_names",
                };
                let tables = fs::read_to_string(list).unwrap_or_default();
                tables.lines().any(|table| shape::TABLES.contains(&table))
            }
        }
    }
}

fn is_own(family: Family, chain: &Chain) -> bool {
    chain.family == NetfilterProtoFamily::from(family) && shape::is_chain(&chain.table, &chain.name)
}

/// Looks through the tables. The second is what could not be looked at, with advice.
pub(super) fn find(chains: &[Chain]) -> (Vec<Piece>, Vec<String>) {
    let (mut pieces, mut problems) = (Vec::new(), Vec::new());
    for family in [Family::Ipv4, Family::Ipv6] {
        for backend in [Backend::Nft, Backend::Legacy] {
            if backend.may_hold(family, chains) {
                match look(backend, family) {
                    Ok(found) => pieces.extend(found),
                    Err(problem) => problems.push(problem),
                }
            }
        }
    }
    (pieces, problems)
}

fn look(backend: Backend, family: Family) -> Result<Vec<Piece>, String> {
    let what = format!("the tables of {} of {}", backend.name(), family.name());
    let told = |error: ToolError| match error {
        ToolError::Missing(_) => format!(
            "{what} may hold rules of kube-proxy's, and there is no {} here: run this on the node itself, with the package iptables",
            program(backend, family, "save"),
        ),
        error => format!("{what} cannot be read: {error}"),
    };
    let (save, restore) = programs(backend, family).map_err(told)?;
    let text = tool::run(&save, &[], "").map_err(told)?;
    if let Some(line) = text.lines().find(|line| line.contains("is incompatible, use 'nft'")) {
        return Err(format!(
            "{what} hold rules that {save} cannot read ({}): delete kube-proxy's chains of that table by `nft`, or restart the node",
            line.trim_start_matches(['#', ' ']),
        ));
    }
    let plans = saved::parse(&text).into_iter().map(|table| plan::plan(&table));
    let is_touched = |plan: &Plan| !plan.is_empty() || !plan.kept.is_empty() || !plan.sets.is_empty();
    Ok(plans.filter(is_touched).map(|plan| Piece { backend, family, restore: restore.clone(), plan }).collect())
}

/// `ip6tables-nft-save`, …
fn program(backend: Backend, family: Family, verb: &str) -> String {
    let backend = backend.name().trim_start_matches("iptables");
    format!("{}{backend}-{verb}", family.iptables())
}

/// The programs that save and restore: those with the backend's name, else those without, if they are of that backend.
fn programs(backend: Backend, family: Family) -> Result<(String, String), ToolError> {
    let (save, restore) = (program(backend, family, "save"), program(backend, family, "restore"));
    match tool::run(&save, &["--version"], "") {
        Err(ToolError::Missing(_)) => {}
        _ => return Ok((save, restore)),
    }
    let plain = family.iptables();
    let version = tool::run(plain, &["--version"], "")?;
    if backend.is_of(&version) {
        return Ok((format!("{plain}-save"), format!("{plain}-restore")));
    }
    Err(ToolError::Missing(save))
}

impl Piece {
    /// Where it is, in words.
    pub(super) fn place(&self) -> String {
        format!("table {} of {} of {}", self.plan.table, self.backend.name(), self.family.name())
    }

    /// Takes it out, all of it or nothing.
    pub(super) fn remove(&self) -> Result<(), String> {
        let script = self.plan.script();
        let done = tool::run(&self.restore, &["--noflush", WAIT], &script);
        done.map(drop).map_err(|error| format!("{} is as it was: {error}", self.place()))
    }
}
