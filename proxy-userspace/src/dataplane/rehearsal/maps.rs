//! Which maps a rehearsal shares with the running programs, and which it has of its own. In: a map's name. Out: what the
//! rehearsal may do with it. Each map of the object is decided on here: one that programs write must not be shared, or asking
//! would change the answer that others get.

/// How a rehearsal has a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// The pinned one: no program writes it.
    Read,
    /// One of its own, empty at first, of at most that many entries.
    Own(u32),
}

/// As large as the pinned one: what is looked up by an index or an id must be there.
const WHOLE: u32 = u32::MAX;
/// Room for one packet and all that is copied for it.
const FEW: u32 = 1_024;
/// Nothing that matters is in it.
const LEAST: u32 = 1;

const MAPS: [(&str, Share); 51] = [
    ("SERVICES_V4", Share::Read),
    ("SERVICES_V6", Share::Read),
    ("SLOTS", Share::Read),
    ("BACKENDS_V4", Share::Read),
    ("BACKENDS_V6", Share::Read),
    ("LOCAL_ADDRS_V4", Share::Read),
    ("LOCAL_ADDRS_V6", Share::Read),
    ("PEER_ADDRS_V4", Share::Read),
    ("PEER_ADDRS_V6", Share::Read),
    ("PEERS", Share::Read),
    ("SOURCES_V4", Share::Read),
    ("SOURCES_V6", Share::Read),
    ("SERVICE_CIDRS", Share::Read),
    ("INBOUND", Share::Read),
    ("OUTBOUND", Share::Read),
    ("NODE", Share::Read),
    ("UPLINKS", Share::Read),
    ("VLANS", Share::Read),
    ("LOCAL_MACS", Share::Read),
    ("NAMES_V4", Share::Read),
    ("NAMES_V6", Share::Read),
    ("AGENT", Share::Read),
    ("DESCRIPTION", Share::Read),
    ("FLOWS_V4", Share::Own(FEW)),
    ("FLOWS_V6", Share::Own(FEW)),
    ("EMBRYOS_V4", Share::Own(FEW)),
    ("EMBRYOS_V6", Share::Own(FEW)),
    ("AFFINITY_V4", Share::Own(FEW)),
    ("AFFINITY_V6", Share::Own(FEW)),
    ("FRAGMENTS_V4", Share::Own(FEW)),
    ("FRAGMENTS_V6", Share::Own(FEW)),
    ("SOCKETS_V4", Share::Own(FEW)),
    ("SOCKETS_V6", Share::Own(FEW)),
    // Written while everything is left to another proxy. Of the pinned ones a rehearsal knows the packet's own tuple.
    ("FOREIGN_V4", Share::Own(FEW)),
    ("FOREIGN_V6", Share::Own(FEW)),
    ("DRAFTS_V4", Share::Own(WHOLE)),
    ("DRAFTS_V6", Share::Own(WHOLE)),
    ("ACTIVE_V4", Share::Own(WHOLE)),
    ("ACTIVE_V6", Share::Own(WHOLE)),
    ("TURNS_V4", Share::Own(WHOLE)),
    ("TURNS_V6", Share::Own(WHOLE)),
    ("MASKED", Share::Own(WHOLE)),
    ("COUNTERS", Share::Own(WHOLE)),
    ("TURNOVER", Share::Own(WHOLE)),
    ("EXPIRED", Share::Own(WHOLE)),
    // Nobody watches a rehearsal.
    ("EVENTS", Share::Own(WHOLE)),
    ("WATCH", Share::Own(WHOLE)),
    ("SERVICE_STATS_4", Share::Own(LEAST)),
    ("SERVICE_STATS_6", Share::Own(LEAST)),
    ("BACKEND_STATS_4", Share::Own(LEAST)),
    ("BACKEND_STATS_6", Share::Own(LEAST)),
];

/// The names of all maps, and whether programs write them.
pub(in crate::dataplane) fn maps() -> impl Iterator<Item = (&'static str, bool)> {
    MAPS.iter().map(|(name, share)| (*name, *share != Share::Read))
}

/// How a rehearsal has the map of a name. One that nobody has decided on is its own, which changes nothing for others.
pub(super) fn share(name: &str) -> Share {
    MAPS.iter().find_map(|(map, share)| (*map == name).then_some(*share)).unwrap_or(Share::Own(WHOLE))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::MAPS;
    use crate::dataplane::{Options, load::map_names};

    #[test]
    fn every_map_is_either_only_read_or_a_rehearsals_own() {
        let decided: BTreeSet<String> = MAPS.iter().map(|(name, _)| (*name).to_owned()).collect();
        let existing = map_names(&Options::new("/sys/fs/bpf/sluice")).unwrap();
        assert_eq!(decided, existing, "does any program write it? then a rehearsal must have its own");
        assert_eq!(decided.len(), MAPS.len(), "none is decided on twice");
    }
}
