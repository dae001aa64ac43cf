//! A node whose agent has ended: a namespace with an uplink and a pod, maps with some Services in them, and programs that
//! are attached. In both families alike.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port, Protocol},
    backend::{Backend, BackendState},
    names::{ServiceName, Text},
    node::{Cidr, ServiceCidrs, local, newcomers},
    service::{Frontend, Pick, Range, Service, WhenEmpty, flag},
};
use proxy_userspace::{
    dataplane::{
        self, Dataplane, NodeSettings, Options, SocketLb, Unfound, UplinkMode,
        netlink::{self, conntrack::TranslatedConnection},
    },
    desired::Prefix,
    diff::{Plan, Step},
    explain::{Answer, Origin, Question, explain},
};
use tests::{
    frame::{Family, Host},
    lab::cgroup::Cgroup,
    netns::Namespace,
    testbed::{NODE, NODE_PORT, OTHER_SERVICE, POD2, PORT, REMOTE, SERVICE, TARGET},
};

static NODES: AtomicU32 = AtomicU32::new(0);

/// Port of a Service by UDP.
pub(crate) const DNS: u16 = 53;
/// NodePort of a Service with policy Local, and no endpoint here.
pub(crate) const LOCAL_PORT: u16 = NODE_PORT + 1;
/// NodePort of a Service for certain clients only.
pub(crate) const SOME_CLIENTS: u16 = NODE_PORT + 2;
/// A ClusterIP that no Service has.
pub(crate) const UNALLOCATED: Host =
    Host { v4: std::net::Ipv4Addr::new(10, 96, 9, 9), v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0x96, 0, 0, 0, 9, 9) };
/// Port of a Service of many backends, taken in turns.
pub(crate) const TURNS: u16 = 81;
/// Port of one whose clients stay with their backend.
pub(crate) const STICKY: u16 = 82;

/// Small maps: tests make them anew, and read every entry.
const SMALL: [&str; 20] = [
    "SERVICES_V4",
    "SERVICES_V6",
    "BACKENDS_V4",
    "BACKENDS_V6",
    "SLOTS",
    "FLOWS_V4",
    "FLOWS_V6",
    "EMBRYOS_V4",
    "EMBRYOS_V6",
    "SOCKETS_V4",
    "SOCKETS_V6",
    "SERVICE_STATS_4",
    "SERVICE_STATS_6",
    "BACKEND_STATS_4",
    "BACKEND_STATS_6",
    "ACTIVE_V4",
    "ACTIVE_V6",
    "TURNS_V4",
    "TURNS_V6",
    "AFFINITY_V4",
];

/// The node. Everything of it is gone when it is dropped.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) pod: Namespace,
    pub(crate) options: Options,
    _wire: Namespace,
    _cgroup: Cgroup,
}

impl Node {
    /// A node whose uplink has XDP or TC.
    pub(crate) fn new(mode: UplinkMode) -> Result<Self> {
        Self::with_sizes(mode, SMALL.map(|map| (map.to_owned(), 1_024)).into())
    }

    /// The same with maps of other sizes.
    pub(crate) fn with_sizes(mode: UplinkMode, sizes: std::collections::BTreeMap<String, u32>) -> Result<Self> {
        let (namespace, pod, wire) = (Namespace::new("node")?, Namespace::new("pod")?, Namespace::new("wire")?);
        let other_end = |namespace: &Namespace| namespace.path().display().to_string();
        namespace.sysctl("net/ipv4/ip_forward", "1")?;
        namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        namespace.ip(&format!(
            "link add up0 address 02:00:00:00:00:01 type veth peer name wire netns {}
             link add pod0 address 02:00:00:00:01:00 type veth peer name eth0 netns {}",
            other_end(&wire),
            other_end(&pod)
        ))?;
        wire.ip("link set wire up")?;
        pod.ip(POD_NETWORK)?;
        namespace.ip(NODE_NETWORK)?;

        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let name = format!("sluice-explain-{}-{number}", std::process::id());
        let mut options = Options::new(Path::new("/sys/fs/bpf").join(name));
        let cgroup = Cgroup::new(5_000 + number)?;
        options.cgroup = Some(cgroup.path().to_owned());
        options.uplink_mode = mode;
        options.uplinks = vec!["up0".parse()?];
        options.pod_devices = vec!["pod0".parse()?];
        options.sizes = sizes;
        let node = Self { namespace, pod, options, _wire: wire, _cgroup: cgroup };
        node.programmed()?;
        Ok(node)
    }

    /// The next agent leaves sockets alone.
    pub(crate) fn without_socket_lb(mut self) -> Result<Self> {
        self.options.socket_lb = SocketLb::Off;
        self.programmed()?;
        Ok(self)
    }

    /// Has an agent's dataplane do its work, and end.
    fn programmed(&self) -> Result<()> {
        self.run(|| {
            let mut dataplane = Dataplane::open(&self.options)?;
            let report = dataplane.attach(&runtime()?.block_on(netlink::snapshot())?)?;
            anyhow::ensure!(report.problems.is_empty(), "{:?}", report.problems);
            dataplane.put_node(&settings())?;
            dataplane.apply(&plan())?;
            let names = [(1, name("http")), (2, name("dns"))];
            dataplane.put_names(&names, &names)?;
            Ok(())
        })
    }

    /// Runs a closure in the node's namespace.
    pub(crate) fn run<T: Send>(&self, closure: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.namespace.run(closure)?
    }

    /// Changes the maps as an agent would.
    pub(crate) fn apply(&self, plan: &Plan) -> Result<()> {
        self.run(|| Ok(Dataplane::open(&self.options)?.apply(plan)?))
    }

    /// Takes the addresses away by which flows are masqueraded, as on a node without a default route.
    pub(crate) fn forget_addresses(&self) -> Result<()> {
        let nobody = NodeSettings { masquerade_v4: Ipv4::ANY, masquerade_v6: Ipv6::ANY, ..settings() };
        self.run(|| Ok(Dataplane::open(&self.options)?.put_node(&nobody)?))
    }

    /// Has another proxy go on with a connection.
    pub(crate) fn leave(&self, connection: TranslatedConnection) -> Result<()> {
        self.run(|| {
            let mut dataplane = Dataplane::open(&self.options)?;
            dataplane.put_newcomers(newcomers::LOOK)?;
            dataplane.put_foreign(&BTreeSet::from([connection]), &BTreeSet::new(), Unfound::Go)?;
            Ok(())
        })
    }

    /// Explains a packet.
    pub(crate) fn explain(&self, client: &str, destination: &str, origin: Origin) -> Result<Answer> {
        let question = Question::new(client.parse()?, destination.parse()?, origin, None)?;
        self.run(|| {
            let answer = runtime()?.block_on(explain(&self.options.pin_path, &question));
            answer.with_context(|| format!("{client} to {destination}"))
        })
    }

    pub(crate) fn maps(&self) -> std::path::PathBuf {
        self.options.pin_path.join("maps")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.namespace.run(|| dataplane::cleanup(&self.options.pin_path));
        let _ = fs::remove_dir(&self.options.pin_path);
    }
}

const POD_NETWORK: &str = "link set eth0 up
     addr add 10.244.1.5/32 dev eth0
     addr add 2001:db8:2441::5/128 dev eth0 nodad
     route add 169.254.1.1 dev eth0
     neigh add 169.254.1.1 lladdr 02:00:00:00:01:00 dev eth0
     route add default via 169.254.1.1
     neigh add fe80::1 lladdr 02:00:00:00:01:00 dev eth0
     route add default via fe80::1 dev eth0";

/// Everybody's address is known: an ICMP error about a packet that nobody takes would come seconds later, and count.
const NODE_NETWORK: &str = "link set up0 up
     link set pod0 up
     addr add 192.0.2.1/24 dev up0
     addr add 2001:db8:1::1/64 dev up0 nodad
     neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev up0
     neigh add 2001:db8:1::2 lladdr 02:00:00:00:00:02 dev up0
     neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev up0
     neigh add 2001:db8:1::fe lladdr 02:00:00:00:00:fe dev up0
     route add default via 192.0.2.254
     route add default via 2001:db8:1::fe
     route add 10.244.2.0/24 via 192.0.2.2
     route add 2001:db8:2442::/64 via 2001:db8:1::2
     route add 10.244.1.5 dev pod0
     route add 2001:db8:2441::5 dev pod0";

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn settings() -> NodeSettings {
    NodeSettings {
        masquerade_v4: NODE.v4.into(),
        masquerade_v6: NODE.v6.into(),
        further: Vec::new(),
        node_ports: 30_000..=32_767,
        source_ports: 10_000..=29_999,
        cross_ports: 9_000..=9_999,
        masquerade_all: false,
        masquerade_local_backends: false,
    }
}

fn name(port: &str) -> ServiceName {
    ServiceName { namespace: Text::new("shop"), name: Text::new("web"), port: Text::new(port) }
}

fn plan() -> Plan {
    let mut service_cidrs = ServiceCidrs::NONE;
    service_cidrs.v4[0] = Cidr { addr: Ipv4 { octets: [10, 96, 0, 0] }, mask: Ipv4 { octets: [255, 255, 0, 0] } };
    let mut mask = [0; 16];
    mask[..6].fill(0xff);
    let addr = Ipv6::from(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0x96, 0, 0, 0, 0, 0));
    service_cidrs.v6[0] = Cidr { addr, mask: Ipv6 { octets: mask } };
    let elsewhere_v4 = Prefix { addr: Ipv4 { octets: [203, 0, 113, 0] }, bits: 24 };
    let elsewhere_v6 =
        Prefix { addr: Ipv6::from(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0)), bits: 48 };
    Plan {
        v4: steps(Family::V4, v4, elsewhere_v4),
        v6: steps(Family::V6, v6, elsewhere_v6),
        service_cidrs: Some(service_cidrs),
        ..Plan::default()
    }
}

fn v4(address: IpAddr) -> Ipv4 {
    if let IpAddr::V4(v4) = address { v4.into() } else { Ipv4::ANY }
}

fn v6(address: IpAddr) -> Ipv6 {
    if let IpAddr::V6(v6) = address { v6.into() } else { Ipv6::ANY }
}

/// The Services of one family.
fn steps<A: Address>(family: Family, of: fn(IpAddr) -> A, some_clients: Prefix<A>) -> Vec<Step<A>> {
    let backend = |host: Host, is_local: u8| Backend {
        addr: of(host.address(family)),
        node: A::ANY,
        port: Port::new(TARGET),
        state: BackendState::Serving,
        is_local,
        generation: 1,
    };
    let first = if family == Family::V4 { 0 } else { 4 };
    let here = Range { first, count: 1 };
    let elsewhere = Range { first: first + 1, count: 1 };
    let both = Range { first, count: 2 };
    let service = |index, flags, internal, external| Service { index, flags, internal, external, ..Service::default() };
    let none = Range::default();
    let at = |host: Host, port, proto| Frontend::new(of(host.address(family)), Port::new(port), proto);
    let node_port = |port| Frontend::new(A::ANY, Port::new(port), Protocol::Tcp);
    let local =
        Service { external_empty: WhenEmpty::Drop, ..service(5, flag::EXTERNAL | flag::SOURCE_KEPT, here, none) };
    let turns = Service { pick: Pick::RoundRobin, ..service(7, 0, both, both) };
    let sticky = Service { affinity_seconds: 600, ..service(8, flag::AFFINITY, both, both) };
    vec![
        Step::PutLocalAddr(of(NODE.address(family)), local::NODE_PORTS),
        Step::PutBackend(1, backend(POD2, 1)),
        Step::PutBackend(2, backend(REMOTE, 0)),
        Step::PutSlots(first, vec![1, 2]),
        Step::PutSource(6, some_clients),
        Step::PutService(at(SERVICE, PORT, Protocol::Tcp), service(1, 0, here, here)),
        Step::PutService(at(SERVICE, DNS, Protocol::Udp), service(2, 0, here, here)),
        Step::PutService(Frontend::whole(of(SERVICE.address(family))), service(0, 0, none, none)),
        Step::PutService(node_port(NODE_PORT), service(3, flag::EXTERNAL, elsewhere, elsewhere)),
        Step::PutService(at(OTHER_SERVICE, PORT, Protocol::Tcp), service(4, 0, none, none)),
        Step::PutService(node_port(LOCAL_PORT), local),
        Step::PutService(node_port(SOME_CLIENTS), service(6, flag::EXTERNAL | flag::SOURCE_RANGES, here, here)),
        Step::PutService(at(SERVICE, TURNS, Protocol::Tcp), turns),
        Step::PutService(at(SERVICE, STICKY, Protocol::Udp), sticky),
    ]
}
