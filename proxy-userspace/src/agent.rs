//! An event's way: from what a source or netlink says to what the kernel does. Whatever waits is taken in together, one
//! plan is made and carried out; after a failure the kernel is read again and everything compared.

mod account;
mod seed;
mod sync;
mod takeover;

use std::{collections::BTreeSet, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{
        mpsc::{self, Receiver, WeakSender},
        watch,
    },
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use self::{
    account::{Account, Pulse},
    sync::{Agent, Watches},
};
use crate::{
    config::{Config, Source},
    dataplane::{
        Dataplane, OpenError,
        netlink::{self, NetworkEvent, Reach, tunnels::TunnelError},
    },
    metrics::Metrics,
    source::{self, Event, kubernetes},
    verify::socket::{self, Question},
};

/// How long the tables wait for the Node object once all else is known: they can do without it, but a restarted agent
/// should not change its mind twice.
const NODE_PATIENCE: Duration = Duration::from_secs(3);

/// Why the agent did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The directory of the file source.
    #[error(transparent)]
    Files(#[from] source::file::OpenError),
    /// The settings of the API server.
    #[error(transparent)]
    Kubernetes(#[from] source::kubernetes::OpenError),
    /// The kernel, or what is pinned in it.
    #[error(transparent)]
    Dataplane(#[from] OpenError),
    /// The devices of tunnels.
    #[error(transparent)]
    Tunnels(#[from] TunnelError),
    /// Signals.
    #[error("cannot listen for signals: {0}")]
    Signals(std::io::Error),
    /// A source that says nothing more would leave the kernel as it is for ever.
    #[error("the source of objects has ended; what is in the kernel stays as it is until the agent is started again")]
    SourceEnded,
    /// The same of netlink.
    #[error("the watch of the node's network has ended; the agent has to be started again")]
    NetworkEnded,
}

impl AgentError {
    /// The exit code of a process that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Files(_) | Self::Kubernetes(_) | Self::Tunnels(_) => 78,
            Self::Dataplane(error) => error.exit_code(),
            Self::Signals(_) | Self::SourceEnded | Self::NetworkEnded => 1,
        }
    }
}

/// Runs until SIGTERM or SIGINT. What is in the kernel stays there.
pub async fn run(config: Config) -> Result<(), AgentError> {
    let (sender, mut events) = mpsc::channel(source::QUEUE);
    let mut terminate = signal(SignalKind::terminate()).map_err(AgentError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AgentError::Signals)?;
    let metrics = Metrics::default();
    let node_name = config.node.name.clone();
    let peers = PeerWatch { sender: sender.downgrade(), node_name, metrics: metrics.clone() };
    let client = start_source(&config, sender, &metrics).await?;
    let mut peers = client.clone().map(|client| (client, peers));
    let reach = if config.dataplane.tunnels { Reach::Routers } else { Reach::Links };
    if reach == Reach::Routers {
        netlink::tunnels::keep().await?;
    }
    let pulse = Pulse::begin(&config, metrics);
    let dataplane = Dataplane::open(&config.dataplane)?;
    let account = Account::open(&config, client, pulse).map_err(OpenError::from)?;
    account.count_sweeps(&dataplane);
    let mut questions = listen(&config);
    let (wanted, asked) = watch::channel(BTreeSet::new());
    let (looks, is_looked) = watch::channel(false);
    let watches = Watches { peers: wanted, foreign: looks };
    let mut agent = Agent::new(dataplane, config, account, watches).map_err(OpenError::from)?;
    let mut network = netlink::watch();
    let mut neighbours = netlink::watch_peers(reach, asked);
    let mut foreign = netlink::conntrack::watch_translated(is_looked);
    loop {
        tokio::select! {
            event = events.recv() => agent.absorb(event.ok_or(AgentError::SourceEnded)?),
            event = network.recv() => agent.absorb_network(event.ok_or(AgentError::NetworkEnded)?),
            macs = neighbours.recv() => agent.absorb_peers(macs.ok_or(AgentError::NetworkEnded)?),
            Some(question) = questions.recv() => {
                agent.answer(question);
                continue;
            }
            found = foreign.recv() => agent.absorb_foreign(found.ok_or(AgentError::NetworkEnded)?),
            () = sleep_until(agent.wakes_at().unwrap_or_else(far_away)) => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
        drain(&mut agent, &mut events, &mut network);
        agent.sync();
        if agent.wants_peers()
            && let Some((client, watch)) = peers.take()
        {
            watch.start(&client);
        }
    }
    info!("stopped; everything stays in the kernel");
    Ok(())
}

/// For those who want to know whether the kernel holds what it should. They have other ways.
fn listen(config: &Config) -> Receiver<Question> {
    let nobody = || mpsc::channel(1).1;
    let Some(state_dir) = &config.state_dir else { return nobody() };
    socket::serve(state_dir, config.dataplane.pin_path.clone()).unwrap_or_else(|error| {
        warn!("{}: no socket: {error}; `sluice verify` will have to read all objects anew", state_dir.display());
        nobody()
    })
}

/// The API server, if there is one, may be asked for more than objects.
pub(crate) async fn start_source(
    config: &Config,
    sender: source::Sender,
    metrics: &Metrics,
) -> Result<Option<kube::Client>, AgentError> {
    Ok(match &config.source {
        Source::Files(directory) => {
            source::file::start(directory.clone(), sender)?;
            None
        }
        Source::Kubernetes(server) => {
            Some(source::kubernetes::start(server, &config.node.name, sender, metrics).await?)
        }
    })
}

/// Starts the watch of other nodes when they begin to matter. It does not keep the channel open that the source's end closes.
struct PeerWatch {
    sender: WeakSender<Event>,
    node_name: String,
    metrics: Metrics,
}

impl PeerWatch {
    fn start(self, client: &kube::Client) {
        if let Some(sender) = self.sender.upgrade() {
            let watches = kubernetes::Watches::default();
            kubernetes::watch_peers(client, &self.node_name, watches, &sender, &self.metrics);
        }
    }
}

/// Takes in what else is there already.
fn drain(agent: &mut Agent, events: &mut Receiver<Event>, network: &mut Receiver<NetworkEvent>) {
    for event in std::iter::from_fn(|| events.try_recv().ok()).take(source::QUEUE) {
        agent.absorb(event);
    }
    for event in std::iter::from_fn(|| network.try_recv().ok()).take(source::QUEUE) {
        agent.absorb_network(event);
    }
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_hours(24)
}
