//! kube-proxy in the lab: what it would write on a node for the lab's Services, loaded by the programs that it uses. Endpoints
//! are chosen at random, clients from outside and pods that get themselves are masqueraded, as there.

mod iptables;
mod nftables;

use std::{io::Write as _, net::IpAddr, process::Stdio};

use anyhow::{Context as _, Result, ensure};

use super::{
    Node,
    address::{self, Family},
    manifest::Service,
};

/// A mode of kube-proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Tables of its own, by `nft`.
    Nftables,
    /// Chains in the table `nat`, by `iptables-nft`.
    Iptables,
}

impl Mode {
    /// Writes the rules for these Services, as if there had been none.
    pub fn write(self, node: &Node, services: &[Service]) -> Result<()> {
        match self {
            Self::Nftables => load(node, &nftables::rules(services)?),
            Self::Iptables => [("iptables-nft-restore", Family::V4), ("ip6tables-nft-restore", Family::V6)]
                .into_iter()
                .try_for_each(|(tool, family)| feed(node, &[tool, "--noflush"], &iptables::rules(family, services)?)),
        }
    }
}

/// Takes the rules of mode nftables away.
pub fn remove(node: &Node) -> Result<()> {
    load(node, nftables::REMOVE)
}

/// Loads rules of anybody's on a node, all or none.
pub fn load(node: &Node, rules: &str) -> Result<()> {
    feed(node, &["nft", "-f", "-"], rules)
}

fn feed(node: &Node, words: &[&str], rules: &str) -> Result<()> {
    let (tool, options) = words.split_first().context("no tool")?;
    let mut command = node.host.namespace().command(tool)?;
    let mut child =
        command.args(options).stdin(Stdio::piped()).spawn().with_context(|| format!("cannot run {tool}"))?;
    child.stdin.take().with_context(|| format!("{tool} takes no rules"))?.write_all(rules.as_bytes())?;
    ensure!(child.wait()?.success(), "{tool} refuses the rules:\n{rules}");
    Ok(())
}

/// All rules on a node without counts and numbers of lines: what stays the same while packets come and go.
pub fn ruleset(node: &Node) -> Result<String> {
    let output = node.host.namespace().command("nft")?.args(["-s", "list", "ruleset"]).output()?;
    ensure!(output.status.success(), "nft cannot list: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Where a Service's pods are.
fn endpoints(service: &Service, family: Family) -> Vec<IpAddr> {
    service.pods.iter().filter_map(|pod| address::pod(pod)).map(|(_, addresses)| addresses.of(family)).collect()
}
