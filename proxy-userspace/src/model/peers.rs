//! The other nodes, as far as packets may be dispatched to them: their names as numbers, because there are many endpoints on
//! each, and their addresses.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use k8s_openapi::api::core::v1 as core;

use super::Node;

/// A node's name as a number, which means nothing beyond this process. 0 stands for none, and for those beyond the 65,535th.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeNumber(u16);

impl NodeNumber {
    fn is_some(self) -> bool {
        self != Self::default()
    }
}

/// Names of nodes, numbered as they are met.
#[derive(Debug, Default)]
pub(super) struct NodeNames(HashMap<Box<str>, NodeNumber>);

impl NodeNames {
    /// The number of a name.
    pub(super) fn number(&mut self, name: &str) -> NodeNumber {
        if let Some(number) = self.0.get(name) {
            return *number;
        }
        let Ok(number) = u16::try_from(self.0.len() + 1) else { return NodeNumber::default() };
        self.0.insert(name.into(), NodeNumber(number));
        NodeNumber(number)
    }
}

/// Another node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where packets for its pods go.
    pub ipv4: Option<Ipv4Addr>,
    /// Where packets for its pods go.
    pub ipv6: Option<Ipv6Addr>,
    /// All its addresses that the API knows.
    pub addresses: BTreeSet<IpAddr>,
}

impl Peer {
    /// What is wrong with it is told by its own agent.
    fn parse(object: &core::Node) -> Self {
        let Node { ipv4, ipv6, addresses, .. } = Node::parse(object, &mut Vec::new());
        Self { ipv4, ipv6, addresses }
    }

    /// Its primary address of one family.
    pub fn address(&self, is_ipv4: bool) -> Option<IpAddr> {
        if is_ipv4 { self.ipv4.map(IpAddr::V4) } else { self.ipv6.map(IpAddr::V6) }
    }
}

/// The other nodes.
#[derive(Debug, Default)]
pub(super) struct Peers {
    known: BTreeMap<NodeNumber, Peer>,
    /// A list was complete once.
    are_known: bool,
    listed: BTreeMap<NodeNumber, Peer>,
    names: NodeNames,
}

impl Peers {
    pub(super) fn names(&mut self) -> &mut NodeNames {
        &mut self.names
    }

    pub(super) fn get(&self, number: NodeNumber) -> Option<&Peer> {
        self.known.get(&number)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Peer> {
        self.known.values()
    }

    pub(super) fn are_known(&self) -> bool {
        self.are_known
    }

    pub(super) fn begin(&mut self) {
        self.listed.clear();
    }

    pub(super) fn list(&mut self, object: &core::Node) {
        let number = self.names.number(object.metadata.name.as_deref().unwrap_or_default());
        if number.is_some() {
            self.listed.insert(number, Peer::parse(object));
        }
    }

    /// The list is complete. Returns those that are others than before.
    pub(super) fn end(&mut self) -> BTreeSet<NodeNumber> {
        self.are_known = true;
        let before = std::mem::replace(&mut self.known, std::mem::take(&mut self.listed));
        let numbers: BTreeSet<NodeNumber> = before.keys().chain(self.known.keys()).copied().collect();
        numbers.into_iter().filter(|number| before.get(number) != self.known.get(number)).collect()
    }

    /// Returns it, if it is another than before.
    pub(super) fn apply(&mut self, object: &core::Node) -> Option<NodeNumber> {
        let number = self.names.number(object.metadata.name.as_deref().unwrap_or_default());
        if !number.is_some() {
            return None;
        }
        let peer = Peer::parse(object);
        let before = self.known.insert(number, peer);
        (before.as_ref() != self.known.get(&number)).then_some(number)
    }

    /// Returns it, if it was there.
    pub(super) fn delete(&mut self, name: &str) -> Option<NodeNumber> {
        let number = self.names.number(name);
        self.known.remove(&number).map(|_| number)
    }
}

#[cfg(test)]
mod tests {
    use super::{NodeNumber, Peers, core};

    fn node(name: &str) -> core::Node {
        let address = core::NodeAddress { address: "192.0.2.1".into(), type_: "InternalIP".into() };
        let mut node = core::Node::default();
        node.metadata.name = Some(name.into());
        node.status = Some(core::NodeStatus { addresses: Some(vec![address]), ..core::NodeStatus::default() });
        node
    }

    #[test]
    fn a_node_beyond_the_last_number_is_nowhere_and_takes_nobodys_place() {
        let mut peers = Peers::default();
        for number in 0..u16::MAX {
            assert!(peers.names().number(&format!("node-{number}")).is_some());
        }
        assert!(peers.apply(&node("node-7")).is_some());
        assert_eq!(peers.apply(&node("one-more")), None);
        peers.begin();
        peers.list(&node("node-7"));
        peers.list(&node("one-more"));
        peers.end();
        assert_eq!((peers.get(NodeNumber::default()), peers.all().count()), (None, 1));
    }
}
