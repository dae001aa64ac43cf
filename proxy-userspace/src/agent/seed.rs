//! The API server's own Service, before all others. After a reboot the maps are empty, and whoever asks the API server by its ClusterIP
//! has to wait until this agent knows everything. What the agent before has remembered of that one Service is written at once: alone,
//! into maps that hold nothing, and by the same way as everything. The first complete picture then finds it as if that agent had left it.

use tokio::time::Instant;
use tracing::info;

use super::{sync::Agent, takeover};
use crate::{
    config::{Config, Source},
    dataplane::{self, netlink::conntrack},
    diff::{Capacity, KernelState},
    reconcile::Reconciler,
    source::{
        Change, Event,
        kubernetes::{Memory, Remembered},
    },
};

/// What an agent of an API server has of the one before it, and leaves to the next one.
pub(super) fn heritage(config: &Config) -> (Option<Remembered>, Option<Memory>) {
    let Source::Kubernetes(server) = &config.source else { return (None, None) };
    let state = server.state.as_deref();
    let remembered = state.map(Remembered::read).filter(|remembered| remembered.service.is_some());
    (remembered, state.map(Memory::new))
}

/// All there is, as far as anything is remembered.
fn picture(Remembered { service, slices }: Remembered) -> [Event; 4] {
    [
        Event::ServiceCidrs(Change::Replace(Vec::new())),
        Event::EndpointSlices(Change::Replace(slices)),
        Event::Services(Change::Replace(service.into_iter().collect())),
        Event::Nodes(Change::Replace(Vec::new())),
    ]
}

fn is_empty(state: &KernelState) -> bool {
    state.v4.services.is_empty() && state.v6.services.is_empty()
}

impl Agent {
    /// Writes what is remembered, once, when the network is known and the maps are empty.
    pub(super) fn seed(&mut self) -> Result<(), dataplane::Error> {
        let (Some(state), Some(network)) = (&self.adopted, &self.network) else { return Ok(()) };
        let Some(remembered) = self.remembered.take().filter(|_| is_empty(state)) else { return Ok(()) };
        let now = Instant::now();
        let mut reconciler = Reconciler::new(self.config.node.clone(), Capacity::default());
        reconciler.adopt(state.clone(), now.into_std());
        reconciler.absorb_network(network.clone());
        for event in picture(remembered) {
            drop(reconciler.absorb(event));
        }
        let (plan, _) = reconciler.plan(now.into_std());
        // Another proxy serves it, and its connections are to be told from new ones first.
        let is_anothers = |found| !takeover::to_services(found, reconciler.tables()).is_empty();
        if self.config.hands_over || conntrack::translated().is_ok_and(is_anothers) {
            return Ok(());
        }
        self.dataplane.put_node(&self.node_settings(&reconciler))?;
        self.dataplane.apply(&plan)?;
        // What is written is read again before anything else is.
        self.is_blind = true;
        let is_attached = self.attach();
        // With the first picture, too.
        self.attach_at = Some(now);
        info!(writes = plan.len(), is_attached, "default/kubernetes is served as it was remembered");
        Ok(())
    }
}
