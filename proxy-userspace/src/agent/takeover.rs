//! Another proxy beside us: kube-proxy, whose place we take or give back. In: how the agent was started, what the kernel holds, and
//! which connections others translate. Out: what becomes of packets that no flow knows.
//!
//! A connection stays with whom it began with. So nobody's is taken at first, and those that come by are noted; then those that
//! the kernel's own table has are added to them, and all others are ours from then on.

use std::{collections::BTreeSet, net::IpAddr};

use proxy_common::node::newcomers::{LEAVE, LOOK};
use tracing::info;

use crate::dataplane::{self, Dataplane, Unfound, netlink::conntrack::TranslatedConnection};

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There is nobody else.
    Alone,
    /// New connections are left to the other one, as the operator wants it.
    Handover,
    /// They are left to it until it is known which ones it has.
    Begun,
    /// Its connections are known, and go on; new ones are ours.
    Following,
}

/// The course of a takeover.
#[derive(Debug)]
pub(super) struct Takeover {
    stage: Stage,
    /// Connections of the other one, when they were last counted.
    foreign: usize,
}

impl Takeover {
    /// By what the kernel holds, and by whether the operator wants new connections to be left to another proxy.
    pub(super) fn new(dataplane: &Dataplane, hands_over: bool) -> Result<Self, dataplane::Error> {
        let left = dataplane.newcomers();
        let stage = if hands_over {
            Stage::Handover
        } else if dataplane.is_fresh() || left & LEAVE != 0 {
            Stage::Begun
        } else if left & LOOK != 0 {
            Stage::Following
        } else {
            Stage::Alone
        };
        if stage == Stage::Handover {
            info!("handing over: new connections are left to the other proxy on this node, known ones go on");
        }
        // Those that an agent before this one has left there.
        let foreign = dataplane.put_foreign(&BTreeSet::new(), &BTreeSet::new(), Unfound::Stay)?;
        Ok(Self { stage, foreign })
    }

    /// What becomes of packets that no flow knows.
    pub(super) fn newcomers(&self) -> u32 {
        match self.stage {
            Stage::Alone => 0,
            Stage::Handover => LEAVE,
            Stage::Begun => LEAVE | LOOK,
            Stage::Following => LOOK,
        }
    }

    /// Whether the kernel's table of connections is to be looked at, again and again.
    pub(super) fn follows(&self) -> bool {
        self.stage == Stage::Following
    }

    /// Whether it is to be looked at now, because the programs see every packet from now on.
    pub(super) fn is_begun(&self) -> bool {
        self.stage == Stage::Begun
    }

    /// Takes in what was found there. `own` are the node's addresses. Returns how many connections of the other one there are.
    pub(super) fn absorb(
        &mut self,
        dataplane: &mut Dataplane,
        found: &BTreeSet<TranslatedConnection>,
        own: &BTreeSet<IpAddr>,
    ) -> Result<usize, dataplane::Error> {
        match self.stage {
            Stage::Alone | Stage::Handover => return Ok(self.foreign),
            Stage::Begun => {
                self.foreign = dataplane.put_foreign(found, own, Unfound::Stay)?;
                self.stage = Stage::Following;
                if self.foreign > 0 {
                    let connections = self.foreign;
                    info!(connections, "connections of another proxy go on as they are; new ones are taken over");
                }
            }
            Stage::Following => {
                let before = self.foreign;
                self.foreign = dataplane.put_foreign(found, own, Unfound::Go)?;
                if self.foreign == 0 {
                    self.stage = Stage::Alone;
                    if before > 0 {
                        info!(
                            "the last connection of another proxy is over: `sluice cleanup --kube-proxy` removes its rules"
                        );
                    }
                }
            }
        }
        dataplane.put_newcomers(self.newcomers())?;
        Ok(self.foreign)
    }
}
