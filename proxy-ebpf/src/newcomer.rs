//! What becomes of packets that no flow knows while this is not the only proxy: kube-proxy is at work beside us and its
//! connections are to go on as they began, or another version of ours takes over. In: a tuple that would open a flow. Out:
//! whether it may. On a node where nothing of the kind goes on that is one load and a branch.

use aya_ebpf::bindings::BPF_ANY;
use proxy_common::{
    node::{foreign, newcomers},
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{admit::Admission, counters::count, family::Family, flow, kernel, service};

/// Whether a packet to a Service, or to what could be one, may open a flow. Out of line, as everything rare.
#[inline(never)]
pub(crate) fn judge<F: Family>(hook: Hook, key: &Tuple<F::Addr>) -> Admission {
    let Some(node) = service::node() else { return Admission::NotOurs };
    if node.is_held(kernel::jiffies()) {
        return Admission::Refused(Outcome::DropHeld);
    }
    if is_foreign::<F>(key) {
        count(hook, Outcome::PassForeign);
        return Admission::NotOurs;
    }
    Admission::GoOn
}

/// Whether a tuple is left to the proxy beside us. While everything is that is to be ours, it is noted: it stays so afterwards, whether
/// or not the agent finds it in the kernel's table of connections.
#[inline(always)]
pub(crate) fn is_foreign<F: Family>(key: &Tuple<F::Addr>) -> bool {
    let flags = service::node().map_or(0, |node| node.flags);
    if flags & (newcomers::LEAVE | newcomers::LOOK) == 0 {
        return false;
    }
    let mut key = *key;
    key.stage = Stage::FromPod;
    if flags & newcomers::LEAVE != 0 {
        if flags & newcomers::LOOK != 0 {
            let _ = F::foreign().insert(&key, foreign::SENT, u64::from(BPF_ANY));
        }
        return true;
    }
    // SAFETY: of the entry one aligned word is read.
    unsafe { F::foreign().get(&key) }.is_some_and(|what| *what == foreign::SENT)
}

/// Whether the replies of the drafted flow would come by the tuple of replies to a connection of the proxy beside us: that one may
/// masquerade by any port, and each of the two would get the other's.
#[inline(never)]
pub(crate) fn meets_foreign_replies<F: Family>(key: &Tuple<F::Addr>) -> bool {
    let Some(draft) = flow::draft::<F>() else { return false };
    draft.twin_key = flow::twin_key(key, &draft.flow);
    draft.twin_key.stage = Stage::FromPod;
    // SAFETY: as above.
    unsafe { F::foreign().get(&draft.twin_key) }.is_some_and(|what| *what == foreign::ANSWERED)
}

/// Whether somebody else may serve connections to Services, too, so that what is none of our flows is not dropped for that.
#[inline(always)]
pub(crate) fn are_others_at_work() -> bool {
    service::node().is_some_and(|node| node.flags & (newcomers::LEAVE | newcomers::LOOK) != 0)
}
