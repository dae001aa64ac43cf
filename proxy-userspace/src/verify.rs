//! Whether the kernel holds what it should. In: an agent's configuration, and the pins. The objects are read anew, from their
//! source, and made into tables as the agent does it; out come the differences, in words. Nothing is written.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use proxy_common::{addr::Address, backend::BackendState, service::Frontend};
use serde::Serialize;
use tokio::{
    sync::mpsc::{self, Receiver},
    time::timeout,
};

use crate::{
    agent::{self, AgentError},
    config::Config,
    dataplane::{self, OpenError, netlink},
    desired::{FamilyTables, Tables},
    diff::{Capacity, FamilyState, KernelState, Plan, Step},
    inspect::State,
    reconcile::Reconciler,
    source::{self, Event},
};

/// Between two looks, while something differs: the agent may be about to write it.
const SECOND_LOOK: Duration = Duration::from_millis(700);

/// How often is looked until a difference is one.
const LOOKS: u32 = 3;

/// How long the Node object is waited for once all else is known, as the agent does.
const NODE_PATIENCE: Duration = Duration::from_secs(3);

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The source of objects.
    #[error(transparent)]
    Source(#[from] AgentError),
    /// The maps.
    #[error(transparent)]
    Maps(#[from] OpenError),
    /// It has said nothing, or not all.
    #[error(
        "the source of objects has not told everything within {0:?}: see that it can be reached, or wait for longer (--timeout)"
    )]
    Silent(Duration),
    /// The node's own devices and addresses.
    #[error("the node's network cannot be read: {0}")]
    Network(String),
}

impl VerifyError {
    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Source(error) => error.exit_code(),
            Self::Maps(error) => error.exit_code(),
            Self::Silent(_) | Self::Network(_) => 1,
        }
    }
}

/// A place where the kernel holds something else than it should.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The map.
    pub map: &'static str,
    /// The entry, and the Service port it is for if that is known.
    pub entry: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What was compared, and what differs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Frontends that the objects ask for.
    pub frontends: usize,
    /// Backends that they name.
    pub backends: usize,
    /// Everything that is not as it should be.
    pub differences: Vec<Difference>,
}

/// Compares. What differs is looked at again, because the agent may be just behind the objects, or ahead of them.
pub async fn verify(config: &Config, patience: Duration) -> Result<Comparison, VerifyError> {
    let (sender, mut events) = mpsc::channel(source::QUEUE);
    let _client = agent::start_source(config, sender).await?;
    let network = netlink::snapshot().await.map_err(|error| VerifyError::Network(error.to_string()))?;
    let mut reconciler = Reconciler::new(config.node.clone(), Capacity::default());
    reconciler.absorb_network(network);
    reconciler.adopt(dataplane::read_pinned(&config.dataplane.pin_path)?, Instant::now());
    learn(&mut reconciler, &mut events, patience).await?;
    let mut comparison = compare(&mut reconciler, &config.dataplane.pin_path)?;
    for _ in 1..LOOKS {
        if comparison.differences.is_empty() {
            break;
        }
        tokio::time::sleep(SECOND_LOOK).await;
        while let Ok(event) = events.try_recv() {
            reconciler.absorb(event);
        }
        comparison = compare(&mut reconciler, &config.dataplane.pin_path)?;
    }
    Ok(comparison)
}

/// Takes in all there is.
async fn learn(
    reconciler: &mut Reconciler,
    events: &mut Receiver<Event>,
    patience: Duration,
) -> Result<(), VerifyError> {
    let silent = || VerifyError::Silent(patience);
    let complete = async {
        while !reconciler.is_complete() {
            reconciler.absorb(events.recv().await.ok_or(AgentError::SourceEnded)?);
        }
        Ok::<_, AgentError>(())
    };
    timeout(patience, complete).await.map_err(|_elapsed| silent())??;
    let node = async {
        while !reconciler.knows_nodes() {
            reconciler.absorb(events.recv().await.ok_or(AgentError::SourceEnded)?);
        }
        Ok::<_, AgentError>(())
    };
    // The tables can do without.
    timeout(NODE_PATIENCE, node).await.unwrap_or(Ok(()))?;
    Ok(())
}

fn compare(reconciler: &mut Reconciler, pin_path: &Path) -> Result<Comparison, VerifyError> {
    if reconciler.asks_for_listeners()
        && let Ok(listeners) = dataplane::listeners()
    {
        reconciler.absorb_listeners(listeners);
    }
    let state = dataplane::read_pinned(pin_path)?;
    let unfiltered = dataplane::unfiltered(pin_path, &state).map_err(OpenError::from)?;
    reconciler.adopt(state.clone(), Instant::now());
    let (plan, overflows) = reconciler.plan(Instant::now());
    let tables = reconciler.tables();
    let mut differences = tell(&plan, &state, tables);
    differences.extend(overflows.into_iter().map(|overflow| Difference {
        map: "SERVICES",
        entry: String::new(),
        problem: overflow.to_string(),
    }));
    differences.extend(unfiltered.into_iter().map(|unfiltered| Difference {
        map: unfiltered.filter,
        entry: unfiltered.address.to_string(),
        problem: "the filter does not know the address: its packets are not looked at".into(),
    }));
    Ok(Comparison {
        frontends: tables.v4.services.len() + tables.v6.services.len(),
        backends: tables.v4.backends.len() + tables.v6.backends.len(),
        differences,
    })
}

/// A plan in words: each write that would be needed is something that is wrong.
fn tell(plan: &Plan, state: &KernelState, tables: &Tables) -> Vec<Difference> {
    let mut differences = Told { state: &state.v4, tables: &tables.v4, maps: &V4 }.all(&plan.v4);
    differences.extend(Told { state: &state.v6, tables: &tables.v6, maps: &V6 }.all(&plan.v6));
    if plan.service_cidrs.is_some() {
        differences.push(Difference {
            map: "SERVICE_CIDRS",
            entry: String::new(),
            problem: "the ranges of ClusterIPs are not the cluster's".into(),
        });
    }
    differences
}

/// The names of a family's maps.
struct MapNames {
    services: &'static str,
    backends: &'static str,
    local_addrs: &'static str,
    sources: &'static str,
}

const V4: MapNames =
    MapNames { services: "SERVICES_V4", backends: "BACKENDS_V4", local_addrs: "LOCAL_ADDRS_V4", sources: "SOURCES_V4" };

const V6: MapNames =
    MapNames { services: "SERVICES_V6", backends: "BACKENDS_V6", local_addrs: "LOCAL_ADDRS_V6", sources: "SOURCES_V6" };

/// One family's steps, with what is there and what should be.
struct Told<'a, A: Ord> {
    state: &'a FamilyState<A>,
    tables: &'a FamilyTables<A>,
    maps: &'a MapNames,
}

impl<A: Address + std::fmt::Display> Told<'_, A> {
    fn all(&self, steps: &[Step<A>]) -> Vec<Difference> {
        steps.iter().map(|step| self.one(step)).collect()
    }

    fn one(&self, step: &Step<A>) -> Difference {
        let told = |map, entry: String, problem: &str| Difference { map, entry, problem: problem.into() };
        match step {
            Step::PutBackend(id, backend) => {
                let found = self.state.backends.get(*id as usize);
                let name = |state: BackendState| State::from(state).name();
                let found = found.map_or("not there", |found| name(found.state));
                let problem = format!("should be {}, is {found}", name(backend.state));
                told(self.maps.backends, format!("{id}: {}:{}", backend.addr, backend.port), &problem)
            }
            Step::PutSlots(first, ids) => {
                let last = *first as usize + ids.len().saturating_sub(1);
                told("SLOTS", format!("{first} to {last}"), "lead to other backends")
            }
            Step::PutLocalAddr(address, _) => told(
                self.maps.local_addrs,
                address.to_string(),
                if self.state.local_addrs.contains_key(address) { "NodePorts differ" } else { "is missing" },
            ),
            Step::RemoveLocalAddr(address) => {
                told(self.maps.local_addrs, address.to_string(), "is not the node's address")
            }
            Step::PutSource(index, prefix) => {
                told(self.maps.sources, format!("{index} from {}/{}", prefix.addr, prefix.bits), "is missing")
            }
            Step::RemoveSource(index, prefix) => {
                told(self.maps.sources, format!("{index} from {}/{}", prefix.addr, prefix.bits), "should not be there")
            }
            Step::PutService(frontend, _) => {
                let is_there = self.state.services.contains_key(frontend);
                let problem = if is_there { "is not as the Service asks for" } else { "is missing" };
                told(self.maps.services, self.name(frontend), problem)
            }
            Step::RemoveService(frontend) => {
                told(self.maps.services, self.name(frontend), "is no Service's, or none's any more")
            }
        }
    }

    fn name(&self, frontend: &Frontend<A>) -> String {
        let Frontend { addr, port, proto, .. } = frontend;
        let address = format!("{addr} port {port}/{proto}");
        let service = self.tables.services.get(frontend);
        service.map_or(address.clone(), |service| format!("{address} of {}", service.port))
    }
}
