//! What hooks and outcomes are called, and what an outcome means. In: what a program has counted. Out: a name, or a sentence that
//! says what happened, and what to do where something is wrong.

use proxy_common::outcome::{Hook, Outcome};

/// `pod_in`
pub fn hook_name(hook: Hook) -> String {
    snake(&format!("{hook:?}"))
}

/// `reject_no_endpoint`
pub fn outcome_name(outcome: Outcome) -> String {
    snake(&format!("{outcome:?}"))
}

/// `NoEndpoint` → `no_endpoint`
pub(crate) fn snake(camel: &str) -> String {
    let mut snake = String::new();
    for (index, letter) in camel.char_indices() {
        if letter.is_ascii_uppercase() && index > 0 {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

/// What happened, and what to do about it if anything is wrong. One sentence, without a full stop.
#[expect(clippy::too_many_lines, reason = "one sentence for each outcome")]
pub const fn meaning(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Opened => "a new connection was given a backend",
        Outcome::Confirmed => "a connection was confirmed: both sides have been heard",
        Outcome::Moved => "a UDP flow left a backend that no longer serves, and chose again",
        Outcome::Repaired => {
            "half of a connection's entry had been evicted and was rebuilt from the other; \
             if this goes on, raise --flow-table-size"
        }
        Outcome::PortChanged => {
            "a new connection was given another source port, because its own was in use towards that backend"
        }
        Outcome::Related => "an ICMP error about a connection was translated with what it quotes",
        Outcome::Echoed => "a ping of a Service's address was answered in place",
        Outcome::Dispatched => "a new connection was handed to its backend's node, which answers the client directly",
        Outcome::NotDispatched => {
            "a new connection was masqueraded instead of dispatched: its backend's node is not known or not a \
             neighbour; look at the Node's addresses and --dsr-dispatch"
        }
        Outcome::Returned => {
            "a packet between the families was answered with an ICMP error: it is too long for its way, or its \
             hop limit ends here"
        }
        Outcome::PassVlan => {
            "passed on untouched: no device of the node is for the VLAN of this frame; make one, if it should be \
             balanced"
        }
        Outcome::PassMalformed => {
            "passed on untouched: a header lies about its length, or ends early; look for what sends it"
        }
        Outcome::PassFragment => "passed on untouched: a later fragment of a packet whose first has not come by here",
        Outcome::PassOptions => "passed on untouched: an IPv4 header that names a route (source routing)",
        Outcome::PassExtension => {
            "passed on untouched: IPv6 extension headers that are not walked, or a route still to be taken"
        }
        Outcome::PassProtocol => "passed on untouched: neither TCP nor UDP nor SCTP, though the address is one of ours",
        Outcome::PassOtherHost => {
            "passed on untouched: the frame is addressed to another host, and a switch or card let it through"
        }
        Outcome::PassForeign => {
            "passed on untouched: a connection that another proxy of this node translates since before the takeover, \
             or in a handover"
        }
        Outcome::DropNoBackend => {
            "dropped: the chosen slot had no backend, which lasts for an instant at most; if it goes on, restart \
             the agent and report it"
        }
        Outcome::DropNoPort => {
            "dropped: no source port was free towards the backend; widen --source-port-range or add addresses to \
             the node"
        }
        Outcome::DropNotWritable => {
            "dropped: the kernel did not let the packet be changed, for want of memory or room; look at the \
             device's driver"
        }
        Outcome::DropNoMasquerade => {
            "dropped: the connection needs the node's address, and the node has none of this family; give the \
                                      Node object one"
        }
        Outcome::DropNoLocalEndpoint => {
            "dropped: the Service's traffic policy is Local and no endpoint is ready on this node"
        }
        Outcome::DropTableFull => {
            "dropped: the new connection could not be entered into the flow table; raise --flow-table-size"
        }
        Outcome::DropMartian => {
            "dropped: a loopback or own address came from elsewhere, or a socket bound to loopback was to leave \
             the node; somebody forges addresses, or a device is named as an uplink that is none"
        }
        Outcome::DropSource => "dropped: the client is in none of the Service's loadBalancerSourceRanges",
        Outcome::DropUnallocated => {
            "dropped: the address is in a ServiceCIDR and no Service has it; the client has an old or wrong \
             address"
        }
        Outcome::DropFragment => {
            "dropped: a later fragment came before the first of its packet, or the first belongs to no connection; \
             the sender tries again"
        }
        Outcome::DropOverlap => {
            "dropped: a fragment that would write over the headers of its packet, as an attack does"
        }
        Outcome::DropNotDispatched => {
            "dropped: a dispatched packet cannot be sent to its node, because its hop limit ends here or that \
             node sent it"
        }
        Outcome::DropNotCrossed => {
            "dropped: a packet between the families that cannot be translated or has no way; a UDP datagram \
             needs a checksum, and the backend a route and a node other than this one"
        }
        Outcome::DropTooLong => {
            "dropped: too long for the tunnel to the backend's node; TCP and UDP are told the path MTU, so see \
             that ICMP reaches the client"
        }
        Outcome::DropHeld => {
            "dropped: it would have opened a connection in the instant in which another version took over; the \
             sender tries again"
        }
        Outcome::RejectNoEndpoint => "rejected: the Service has no ready endpoint; look at its pods and its selector",
        Outcome::RejectNoPort => {
            "rejected: the Service defines no such port; correct the client, or the Service's ports"
        }
        Outcome::ResetGone => "reset: the connection's backend has left every EndpointSlice; the client connects anew",
        Outcome::RefuseBind => {
            "refused: a process of the node wanted a port that is a NodePort in use; give it another port"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proxy_common::outcome::Outcome;

    use super::meaning;
    use crate::metrics::named;

    /// What a sentence begins with, by the series that its outcome is counted in.
    fn beginnings(series: &str) -> &'static [&'static str] {
        match series {
            "sluice_passes" => &["passed on untouched: "],
            "sluice_drops" => &["dropped: "],
            "sluice_rejects" => &["rejected: "],
            "sluice_resets" => &["reset: "],
            "sluice_refusals" => &["refused: "],
            _ => &["a ", "an ", "half "],
        }
    }

    #[test]
    fn a_sentence_begins_with_what_became_of_the_packet() {
        for outcome in Outcome::ALL {
            let series = named(outcome).0;
            let sentence = meaning(outcome);
            assert!(beginnings(series).iter().any(|word| sentence.starts_with(word)), "{outcome:?}: {sentence}");
        }
    }

    #[test]
    fn no_two_outcomes_mean_the_same_and_all_fit_into_a_line_of_a_table() {
        let sentences: BTreeSet<&str> = Outcome::ALL.into_iter().map(meaning).collect();
        assert_eq!(sentences.len(), Outcome::ALL.len());
        for sentence in sentences {
            assert!(!sentence.contains("  ") && !sentence.ends_with('.'), "{sentence}");
        }
    }
}
