//! A node without an agent: a namespace with two uplinks and two pods, a cgroup and a pin path of its own; and a
//! stranger, whose programs have nothing to do with Sluice.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapInfo},
    programs::{
        LinkOrder, Program, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
};
use proxy_common::{
    addr::Ipv4,
    filter::{Filter, Hashed as _},
    node,
};
use proxy_userspace::dataplane::{
    self, AttachReport, Dataplane, OBJECT, Options,
    netlink::{self, NodeNetwork},
};
use tests::netns::Namespace;

static NODES: AtomicU32 = AtomicU32::new(0);

/// Small maps: they are made anew for every test.
const SIZES: [&str; 6] = ["FLOWS_V4", "FLOWS_V6", "EMBRYOS_V4", "EMBRYOS_V6", "SOCKETS_V4", "SOCKETS_V6"];

/// The node. Everything of it is gone when it is dropped.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) options: Options,
    _peers: Namespace,
}

impl Node {
    pub(crate) fn new() -> Result<Self> {
        let namespace = Namespace::new("node")?;
        let peers = Namespace::new("peers")?;
        let peer = peers.path().display().to_string();
        let pairs = ["up0", "up1", "pod0", "pod1"];
        for name in pairs {
            namespace
                .ip(&format!("link add {name} type veth peer name {name}-peer netns {peer}\nlink set {name} up"))?;
            peers.ip(&format!("link set {name}-peer up"))?;
        }
        namespace.ip("address add 192.0.2.1/24 dev up0\nroute add default via 192.0.2.254 dev up0")?;
        namespace.ip("address add 2001:db8::1/64 dev up1\nroute add default via 2001:db8::fe dev up1")?;

        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let name = format!("sluice-test-{}-{number}", std::process::id());
        let cgroup = cgroup_root()?.join(&name);
        fs::create_dir(&cgroup).with_context(|| format!("cannot make cgroup {}", cgroup.display()))?;
        let mut options = Options::new(Path::new("/sys/fs/bpf").join(&name));
        options.cgroup = Some(cgroup);
        options.sizes = SIZES.map(|map| (map.into(), 1_024)).into();
        Ok(Self { namespace, options, _peers: peers })
    }

    /// Runs a closure in the node's namespace.
    pub(crate) fn run<T: Send>(&self, closure: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.namespace.run(closure)?
    }

    /// Starts an agent's dataplane and attaches it, and looks at it.
    pub(crate) fn start<T: Send>(
        &self,
        look: impl FnOnce(&mut Dataplane, AttachReport) -> Result<T> + Send,
    ) -> Result<T> {
        self.run(|| {
            let mut dataplane = Dataplane::open(&self.options)?;
            let report = dataplane.attach(&network()?)?;
            look(&mut dataplane, report)
        })
    }

    pub(crate) fn pin(&self, path: &str) -> PathBuf {
        self.options.pin_path.join(path)
    }

    /// Names of the pinned links, in order.
    pub(crate) fn links(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = fs::read_dir(self.pin("links"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    }

    /// Id of a pinned link and of its program.
    pub(crate) fn link(&self, name: &str) -> Result<(u32, u32)> {
        let link: FdLink = PinnedLink::from_pin(self.pin("links").join(name))?.into();
        let info = link.info()?;
        Ok((info.id(), info.program_id()))
    }

    /// Id of a pinned map.
    pub(crate) fn map(&self, name: &str) -> Result<u32> {
        Ok(MapInfo::from_pin(self.pin("maps").join(name))?.id())
    }

    /// How many entries a pinned map has room for.
    pub(crate) fn capacity(&self, name: &str) -> Result<u32> {
        Ok(MapInfo::from_pin(self.pin("maps").join(name))?.max_entries())
    }

    /// Whether an address filter lets an address through.
    pub(crate) fn filter(&self, map: &str, address: Ipv4) -> Result<bool> {
        let map = MapData::from_pin(self.pin("maps").join(map))?;
        let filter: Array<_, Filter> = Map::Array(map).try_into()?;
        Ok(filter.get(&0, 0)?.may_have(address.bit()))
    }

    /// The entry of `NODE`.
    pub(crate) fn entry(&self) -> Result<node::Node> {
        let map: Array<_, node::Node> = Map::Array(MapData::from_pin(self.pin("maps/NODE"))?).try_into()?;
        Ok(map.get(&0, 0)?)
    }

    /// The keys of `UPLINKS`, in order.
    pub(crate) fn uplinks(&self) -> Result<Vec<u32>> {
        let map: HashMap<_, u32, u32> = Map::HashMap(MapData::from_pin(self.pin("maps/UPLINKS"))?).try_into()?;
        let mut devices = map.keys().collect::<Result<Vec<_>, _>>()?;
        devices.sort_unstable();
        Ok(devices)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.namespace.run(|| dataplane::cleanup(&self.options.pin_path));
        if let Some(cgroup) = &self.options.cgroup {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

/// The network of the calling thread's namespace.
pub(crate) fn network() -> Result<NodeNetwork> {
    Ok(runtime()?.block_on(netlink::snapshot())?)
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    Ok(mount.and_then(|line| line.split(' ').nth(1)).context("no cgroup v2 is mounted")?.into())
}

/// Somebody else's programs, with maps of their own.
pub(crate) struct Stranger {
    object: Ebpf,
}

impl Stranger {
    pub(crate) fn new() -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for map in SIZES {
            loader.map_max_entries(map, 1_024);
        }
        Ok(Self { object: loader.load(OBJECT)? })
    }

    fn xdp_program(&mut self) -> Result<&mut Xdp> {
        let Some(Program::Xdp(program)) = self.object.program_mut("jiffies") else {
            anyhow::bail!("no program jiffies")
        };
        if program.fd().is_err() {
            program.load()?;
        }
        Ok(program)
    }

    /// Occupies a device's XDP hook until the link is dropped; also returns the program's id.
    pub(crate) fn xdp(&mut self, device: &str) -> Result<(XdpLink, u32)> {
        let program = self.xdp_program()?;
        let link = program.attach(device, XdpMode::Driver)?;
        Ok((program.take_link(link)?, program.info()?.id()))
    }

    fn classifier(&mut self) -> Result<&mut SchedClassifier> {
        let Some(Program::SchedClassifier(program)) = self.object.program_mut("pod_in") else {
            anyhow::bail!("no program pod_in")
        };
        program.load()?;
        Ok(program)
    }

    /// Joins a device's TCX chain until the link is dropped; also returns the program's id.
    pub(crate) fn tcx(&mut self, device: &str) -> Result<(SchedClassifierLink, u32)> {
        let program = self.classifier()?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::last());
        let link = program.attach_with_options(device, TcAttachType::Ingress, options)?;
        Ok((program.take_link(link)?, program.info()?.id()))
    }

    /// Adds a filter with the same program as ours, at priority 77, until the link is dropped.
    pub(crate) fn filter(&mut self, device: &str) -> Result<SchedClassifierLink> {
        let program = self.classifier()?;
        let options = NlOptions { priority: 77, ..NlOptions::default() };
        let link = program.attach_with_options(device, TcAttachType::Ingress, TcAttachOptions::Netlink(options))?;
        Ok(program.take_link(link)?)
    }

    /// The low 32 bits of jiffies.
    pub(crate) fn jiffies(&mut self) -> Result<u32> {
        use aya::programs::{TestRun as _, TestRunOptions};
        let frame = [0; 64];
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
        Ok(self.xdp_program()?.test_run(options)?.return_value)
    }

    /// Pins a program of the stranger's.
    pub(crate) fn pin(&mut self, path: &Path) -> Result<()> {
        Ok(self.xdp_program()?.pin(path)?)
    }
}

/// Ids of the programs of a device's TCX ingress chain, in order.
pub(crate) fn tcx_chain(device: &str) -> Result<Vec<u32>> {
    let (_, programs) = SchedClassifier::query_tcx(device, TcAttachType::Ingress)?;
    Ok(programs.iter().map(aya::programs::ProgramInfo::id).collect())
}

/// What `tc filter show` says of one side of a device of the calling thread's namespace.
pub(crate) fn filters(namespace: &Namespace, device: &str, side: &str) -> Result<String> {
    let output = namespace.command("tc")?.args(["filter", "show", "dev", device, side]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
