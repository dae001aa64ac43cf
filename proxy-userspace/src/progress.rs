//! How far the agent has come, as others may ask at any time: the loop says when an update begins to wait and when the
//! kernel has it, and whoever answers for the agent's health reads it. A lock is held for as long as it takes to copy.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;

/// An address family, as labels and the health's body name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As Kubernetes writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// What is said about the agent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// No update of either family has waited for too long.
    pub is_healthy: bool,
    /// The node may be sent traffic: it is not about to go.
    pub is_node_eligible: bool,
    /// The kernel has held the first complete picture.
    pub is_ready: bool,
    /// Each family by itself, in the order of [`IpFamily::ALL`].
    pub families: [FamilyHealth; 2],
}

/// What is said about one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FamilyHealth {
    /// No update has waited for too long.
    pub is_healthy: bool,
    /// When the kernel followed last.
    pub updated: Option<Timestamp>,
}

/// How far the agent has come.
#[derive(Debug)]
pub struct Progress {
    /// An update may wait for this long.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    families: [Family; 2],
    is_node_eligible: bool,
    is_ready: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Family {
    /// Since when the oldest update waits.
    queued: Option<Instant>,
    updated: Option<Timestamp>,
}

impl Progress {
    /// Nothing waits yet. An update that waits for longer than `patience` is a failure.
    pub fn new(patience: Duration) -> Self {
        let state = State { families: [Family::default(); 2], is_node_eligible: true, is_ready: false };
        Self { patience, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An update of both families waits, if none did already.
    pub fn queue(&self, now: Instant) {
        for family in &mut self.state().families {
            family.queued.get_or_insert(now);
        }
    }

    /// The kernel has everything of a family.
    pub fn finish(&self, family: IpFamily, at: Timestamp) {
        self.state().families[family as usize] = Family { queued: None, updated: Some(at) };
    }

    /// The kernel has held the first complete picture, and programs that go by it.
    pub fn set_ready(&self) {
        self.state().is_ready = true;
    }

    /// Whether the node may be sent traffic.
    pub fn set_node_eligible(&self, is_eligible: bool) {
        self.state().is_node_eligible = is_eligible;
    }

    /// What is to be said now.
    pub fn health(&self, now: Instant) -> Health {
        let state = self.state();
        let families = state.families.map(|family| FamilyHealth {
            is_healthy: family.queued.is_none_or(|since| now.saturating_duration_since(since) < self.patience),
            updated: family.updated,
        });
        Health {
            is_healthy: families.iter().all(|family| family.is_healthy),
            is_node_eligible: state.is_node_eligible,
            is_ready: state.is_ready,
            families,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use jiff::Timestamp;

    use super::{IpFamily, Progress};

    const PATIENCE: Duration = Duration::from_mins(1);

    #[test]
    fn an_agent_that_was_told_nothing_is_healthy_for_ever() {
        let progress = Progress::new(PATIENCE);
        let health = progress.health(Instant::now() + 100 * PATIENCE);
        assert!(health.is_healthy && health.is_node_eligible && !health.is_ready);
    }

    #[test]
    fn the_oldest_update_of_either_family_decides() {
        let (progress, began) = (Progress::new(PATIENCE), Instant::now());
        progress.queue(began);
        // Another one that comes later does not begin the wait anew.
        progress.queue(began + PATIENCE / 2);
        assert!(progress.health(began + PATIENCE.mul_f32(0.99)).is_healthy);
        assert!(!progress.health(began + PATIENCE).is_healthy);
        progress.finish(IpFamily::V4, Timestamp::UNIX_EPOCH);
        let health = progress.health(began + PATIENCE);
        assert!(!health.is_healthy, "IPv6 still waits");
        assert_eq!(health.families.map(|family| family.is_healthy), [true, false]);
        progress.finish(IpFamily::V6, Timestamp::UNIX_EPOCH);
        assert!(progress.health(began + 100 * PATIENCE).is_healthy);
    }
}
