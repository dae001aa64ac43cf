//! How a new flow travels: which follows from where its client and its backend are, and from what the Service and the node
//! say of masquerading.

use proxy_common::{node::masquerade, service::flag, tuple::Stage};

/// Where a backend is, seen from this node and from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is the client.
    Client,
    /// It is the node itself, by an address of its own.
    Node,
    /// A pod of this node.
    Pod,
    /// Elsewhere.
    Elsewhere,
}

/// How many pairs of entries a flow needs, and what they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// One that replaces the destination.
    Direct,
    /// One that replaces both and turns the packet round: a pod that picked itself.
    Hairpin,
    /// One that replaces both and sends the packet on, without the kernel's routing.
    Forward,
    /// Two: the kernel routes in between, and would refuse to forward what bears its own address, so that the source is
    /// replaced where the packet leaves for its backend.
    Masked,
}

/// The way of a flow. The flags are those of the Service and of the node.
#[inline(always)]
pub(crate) const fn way(is_internal: bool, place: Place, service: u8, node: u32) -> Way {
    match place {
        // It would answer itself directly: it must believe that the node asks.
        Place::Client if is_internal => Way::Hairpin,
        // The other node would answer the client directly: replies must come back this way.
        Place::Elsewhere | Place::Client if !is_internal => Way::Forward,
        Place::Pod | Place::Elsewhere if is_masked(is_internal, place, service, node) => Way::Masked,
        // The node cannot be shown its own address as a client's.
        Place::Pod | Place::Elsewhere | Place::Node | Place::Client => Way::Direct,
    }
}

/// kube-proxy's rules, but for external addresses that lead to backends of this node: their replies come this way anyhow.
#[inline(always)]
const fn is_masked(is_internal: bool, place: Place, service: u8, node: u32) -> bool {
    if service & flag::EXTERNAL == 0 {
        return !is_internal || node & masquerade::ALL != 0;
    }
    service & flag::SOURCE_KEPT == 0 && (matches!(place, Place::Elsewhere) || node & masquerade::LOCAL_BACKENDS != 0)
}

/// Where a packet leaves for its backend.
#[inline(always)]
pub(crate) const fn mask_stage(place: Place) -> Stage {
    if matches!(place, Place::Pod) { Stage::ToPod } else { Stage::UplinkOut }
}

#[cfg(test)]
mod tests {
    use proxy_common::{
        node::masquerade::{ALL, LOCAL_BACKENDS},
        service::flag::{EXTERNAL, SOURCE_KEPT},
    };

    use super::{
        Place::{self, Client, Elsewhere, Node, Pod},
        Way::{self, Direct, Forward, Hairpin, Masked},
        way,
    };

    const KEPT: u8 = EXTERNAL | SOURCE_KEPT;
    const INSIDE: bool = true;
    const OUTSIDE: bool = false;

    #[test]
    fn sources_are_replaced_where_the_table_says() {
        let cases: [(&str, bool, Place, u8, u32, Way); 21] = [
            ("a pod that picked itself", INSIDE, Client, 0, 0, Hairpin),
            ("by an external address", INSIDE, Client, KEPT, 0, Hairpin),
            ("pod, ClusterIP, a pod here", INSIDE, Pod, 0, 0, Direct),
            ("pod, ClusterIP, a pod elsewhere", INSIDE, Elsewhere, 0, LOCAL_BACKENDS, Direct),
            ("the same, everything masqueraded", INSIDE, Elsewhere, 0, ALL, Masked),
            ("a pod here, everything masqueraded", INSIDE, Pod, 0, ALL, Masked),
            ("pod, NodePort, a pod elsewhere", INSIDE, Elsewhere, EXTERNAL, 0, Masked),
            ("pod, NodePort, a pod here", INSIDE, Pod, EXTERNAL, ALL, Direct),
            ("the same, as kube-proxy", INSIDE, Pod, EXTERNAL, LOCAL_BACKENDS, Masked),
            ("pod, NodePort, Local, elsewhere", INSIDE, Elsewhere, KEPT, ALL | LOCAL_BACKENDS, Direct),
            ("pod, NodePort, Local, here", INSIDE, Pod, KEPT, ALL | LOCAL_BACKENDS, Direct),
            ("outside, ClusterIP, a pod here", OUTSIDE, Pod, 0, 0, Masked),
            ("outside, ClusterIP, elsewhere", OUTSIDE, Elsewhere, 0, 0, Forward),
            ("outside, NodePort, a pod here", OUTSIDE, Pod, EXTERNAL, ALL, Direct),
            ("the same, as kube-proxy", OUTSIDE, Pod, EXTERNAL, LOCAL_BACKENDS, Masked),
            ("outside, NodePort, elsewhere", OUTSIDE, Elsewhere, EXTERNAL, 0, Forward),
            ("outside, NodePort, Local, here", OUTSIDE, Pod, KEPT, ALL | LOCAL_BACKENDS, Direct),
            ("a pod of another node that picked itself", OUTSIDE, Client, EXTERNAL, 0, Forward),
            ("outside, ClusterIP, the node itself", OUTSIDE, Node, 0, ALL, Direct),
            ("pod, NodePort, the node itself", INSIDE, Node, EXTERNAL, LOCAL_BACKENDS, Direct),
            ("pod, ClusterIP, the node itself", INSIDE, Node, 0, ALL, Direct),
        ];
        for (name, is_internal, place, service, node, expected) in cases {
            assert_eq!(way(is_internal, place, service, node), expected, "{name}");
        }
    }
}
