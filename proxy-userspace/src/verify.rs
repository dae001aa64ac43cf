//! Whether the kernel holds what it should. In: an agent that runs, or its configuration, and the pins. The agent compares its own
//! tables with the maps; or the objects are read anew, from their source, and made into tables as the agent does it. Out come the
//! differences, in words. Nothing is written.

pub(crate) mod socket;

use std::{
    borrow::Cow,
    collections::BTreeSet,
    panic,
    path::Path,
    time::{Duration, Instant},
};

use proxy_common::{addr::Address, backend::BackendState, service::Frontend};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::mpsc::{self, Receiver},
    task,
    time::timeout,
};

pub(crate) use self::socket::FILE as SOCKET;
use self::socket::{Answer, Asked};
use crate::{
    agent::{self, AgentError},
    config::Config,
    dataplane::{self, OpenError, Unfiltered, netlink},
    desired::{FamilyTables, Tables},
    diff::{Capacity, FamilyState, KernelState, Ledger, Overflow, Plan, Step},
    inspect::State,
    metrics::Metrics,
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
    /// The agent has said nothing.
    #[error(
        "the agent has not answered within {0:?}: see `sluice status`, or read the objects from their source (--anew)"
    )]
    AgentSilent(Duration),
    /// The node's own devices and addresses.
    #[error("the node's network cannot be read: {0}")]
    Network(String),
    /// The agent has nothing to compare with.
    #[error("the agent is not in sync yet: see `sluice status`, or read the objects from their source (--anew)")]
    NotInSync,
    /// The agent could not compare.
    #[error("the agent cannot compare: {0}")]
    Agent(String),
}

impl VerifyError {
    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Source(error) => error.exit_code(),
            Self::Maps(error) => error.exit_code(),
            Self::Silent(_) | Self::AgentSilent(_) | Self::Network(_) | Self::NotInSync | Self::Agent(_) => 1,
        }
    }
}

/// A place where the kernel holds something else than it should.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Difference {
    /// The map.
    pub map: Cow<'static, str>,
    /// The entry, and the Service port it is for if that is known.
    pub entry: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What the kernel is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objects {
    /// The objects as the agent that runs has heard of them.
    Agent,
    /// Those that their source has now.
    Source,
}

/// What was compared, and what differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// By whose word.
    pub objects: Objects,
    /// Frontends that the objects ask for.
    pub frontends: usize,
    /// Backends that they name.
    pub backends: usize,
    /// Everything that is not as it should be.
    pub differences: Vec<Difference>,
}

/// Has the agent with that number compare, whose `--state-dir` this is, as seen from here. What differs is looked at again, because the
/// agent writes while it compares.
pub async fn by_agent(state_dir: &Path, pid: u32, patience: Duration) -> Result<ByAgent, VerifyError> {
    let ask = async || {
        let answer = timeout(patience, socket::ask(state_dir, pid)).await;
        match answer.map_err(|_elapsed| VerifyError::AgentSilent(patience))? {
            Asked::Answered(Answer::Compared(comparison)) => Ok(ByAgent::Compared(comparison)),
            Asked::Answered(Answer::NotInSync) => Err(VerifyError::NotInSync),
            Asked::Answered(Answer::Failed(error)) => Err(VerifyError::Agent(error)),
            Asked::Nobody(reason) => Ok(ByAgent::Nobody(reason)),
        }
    };
    let mut comparison = match ask().await? {
        ByAgent::Compared(comparison) => comparison,
        nobody @ ByAgent::Nobody(_) => return Ok(nobody),
    };
    for _ in 1..LOOKS {
        if comparison.differences.is_empty() {
            break;
        }
        tokio::time::sleep(SECOND_LOOK).await;
        let ByAgent::Compared(again) = ask().await? else { break };
        comparison = again.standing(&comparison);
    }
    Ok(ByAgent::Compared(comparison))
}

/// What comes of having the agent compare.
#[derive(Debug)]
pub enum ByAgent {
    /// It has.
    Compared(Comparison),
    /// It cannot be asked: why.
    Nobody(String),
}

impl Comparison {
    /// This one, of whose differences only those count that stood in an earlier one, too: what is written between the reading of one map
    /// and of another looks like one.
    fn standing(mut self, earlier: &Self) -> Self {
        let earlier: BTreeSet<&Difference> = earlier.differences.iter().collect();
        self.differences.retain(|difference| earlier.contains(difference));
        self
    }
}

/// Reads the objects anew, and compares. What differs is looked at again, because the agent may be just behind the objects, or ahead of
/// them.
pub async fn anew(config: &Config, patience: Duration) -> Result<Comparison, VerifyError> {
    let (sender, mut events) = mpsc::channel(source::QUEUE);
    let _client = agent::start_source(config, sender, &Metrics::default()).await?;
    let pin_path = &config.dataplane.pin_path;
    // While the objects are read: the two take most of the time.
    let path = pin_path.clone();
    let state = task::spawn_blocking(move || dataplane::read_pinned(&path));
    let network = netlink::snapshot().await.map_err(|error| VerifyError::Network(error.to_string()))?;
    let mut reconciler = Reconciler::new(config.node.clone(), Capacity::default());
    reconciler.absorb_network(network);
    learn(&mut reconciler, &mut events, patience).await?;
    let state = state.await.unwrap_or_else(|failed| panic::resume_unwind(failed.into_panic()))?;
    let mut comparison = compare(&mut reconciler, pin_path, &state)?;
    for _ in 1..LOOKS {
        if comparison.differences.is_empty() {
            break;
        }
        tokio::time::sleep(SECOND_LOOK).await;
        while let Ok(event) = events.try_recv() {
            reconciler.absorb(event);
        }
        comparison = compare(&mut reconciler, pin_path, &dataplane::read_pinned(pin_path)?)?.standing(&comparison);
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
        while !reconciler.knows_all() {
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

fn compare(reconciler: &mut Reconciler, pin_path: &Path, state: &KernelState) -> Result<Comparison, VerifyError> {
    if reconciler.asks_for_listeners()
        && let Ok(listeners) = dataplane::listeners()
    {
        reconciler.absorb_listeners(listeners);
    }
    let unfiltered = dataplane::unfiltered(pin_path, state).map_err(OpenError::from)?;
    reconciler.adopt(state.clone(), Instant::now());
    let planned = reconciler.plan(Instant::now());
    Ok(told(Objects::Source, planned, unfiltered, state, reconciler.tables()))
}

/// The same for an agent's tables.
fn of_tables(tables: &Tables, pin_path: &Path) -> Result<Comparison, VerifyError> {
    let state = dataplane::read_pinned(pin_path)?;
    let unfiltered = dataplane::unfiltered(pin_path, &state).map_err(OpenError::from)?;
    let now = Instant::now();
    // An agent has little memory to spare: the state is read once more where there is something to say about it.
    let planned = Ledger::adopt(state, Capacity::default(), now).plan_all(tables, now);
    let state = if planned.0.is_empty() { KernelState::default() } else { dataplane::read_pinned(pin_path)? };
    Ok(told(Objects::Agent, planned, unfiltered, &state, tables))
}

fn told(
    objects: Objects,
    (plan, overflows): (Plan, Vec<Overflow>),
    unfiltered: Vec<Unfiltered>,
    state: &KernelState,
    tables: &Tables,
) -> Comparison {
    let mut differences = tell(&plan, state, tables);
    differences.extend(overflows.into_iter().map(|overflow| Difference {
        map: "SERVICES".into(),
        entry: String::new(),
        problem: overflow.to_string(),
    }));
    differences.extend(unfiltered.into_iter().map(|unfiltered| Difference {
        map: unfiltered.filter.into(),
        entry: unfiltered.address.to_string(),
        problem: "the filter does not know the address: its packets are not looked at".into(),
    }));
    Comparison {
        objects,
        frontends: tables.v4.services.len() + tables.v6.services.len(),
        backends: tables.v4.backends.len() + tables.v6.backends.len(),
        differences,
    }
}

/// A plan in words: each write that would be needed is something that is wrong.
fn tell(plan: &Plan, state: &KernelState, tables: &Tables) -> Vec<Difference> {
    let mut differences = Told { state: &state.v4, tables: &tables.v4, maps: &V4 }.all(&plan.v4);
    differences.extend(Told { state: &state.v6, tables: &tables.v6, maps: &V6 }.all(&plan.v6));
    if plan.service_cidrs.is_some() {
        differences.push(Difference {
            map: "SERVICE_CIDRS".into(),
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
        let told = |map: &'static str, entry: String, problem: &str| {
            let (map, problem) = (map.into(), problem.into());
            Difference { map, entry, problem }
        };
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

#[cfg(test)]
mod tests {
    use super::{Comparison, Difference, Objects};

    fn looks(differing: &[&str]) -> Comparison {
        let differences = differing
            .iter()
            .map(|entry| Difference { map: "SERVICES_V4".into(), entry: (*entry).into(), problem: "is missing".into() })
            .collect();
        Comparison { objects: Objects::Agent, frontends: 3, backends: 3, differences }
    }

    /// An agent that writes all the time is caught in the middle of another write each time.
    #[test]
    fn only_what_stands_in_every_look_differs() {
        let standing = looks(&["c", "d"]).standing(&looks(&["b", "c"]).standing(&looks(&["a", "b", "c"])));
        assert_eq!(standing, looks(&["c"]));
        assert_eq!(looks(&["b"]).standing(&looks(&["a"])), looks(&[]));
    }
}
