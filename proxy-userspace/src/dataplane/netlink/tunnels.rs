//! The devices by which packets come that other nodes dispatch here behind an IP header: one for each family, which the kernel
//! gives every such packet that no other device is for. It takes the header off and remembers whose it was.

use std::{fs, io, time::Duration};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec,
    packet_route::link::{InfoData, InfoIpTunnel, InfoKind},
};

use crate::supervise;

/// How often somebody may have taken them away.
const PERIOD: Duration = Duration::from_secs(30);

/// A kind of device, and what ours is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tunnel {
    name: &'static str,
    /// As the kernel calls it, and the module that has it.
    kind: &'static str,
    module: &'static str,
}

const TUNNELS: [Tunnel; 2] = [
    Tunnel { name: "sluice_ipip", kind: "ipip", module: "ipip" },
    Tunnel { name: "sluice_ip6tnl", kind: "ip6tnl", module: "ip6_tunnel" },
];

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The kernel refuses.
    #[error(
        "device {name} for packets that other nodes dispatch here cannot be made ({source}): load the kernel module {module}; no \
         other device of kind {kind} may be external; or set --dsr-dispatch=link, on every node"
    )]
    Refused {
        /// Its name.
        name: &'static str,
        /// Its kind.
        kind: &'static str,
        /// What has that kind.
        module: &'static str,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// No connection to it.
    #[error("cannot open netlink: {0}")]
    Open(#[from] io::Error),
}

/// Whether a link is one of them.
pub fn is_tunnel(name: &str) -> bool {
    TUNNELS.iter().any(|tunnel| tunnel.name == name)
}

/// Makes what is missing of them, and goes on to do so until the process ends. Must be called in a tokio runtime.
pub async fn keep() -> Result<(), TunnelError> {
    let handle = open()?;
    for tunnel in TUNNELS {
        ensure(&handle, tunnel).await?;
    }
    warn_of_filter();
    supervise::spawn("the watch of the tunnels' devices", move || watch(handle.clone()));
    Ok(())
}

async fn watch(handle: Handle) {
    loop {
        tokio::time::sleep(PERIOD).await;
        for tunnel in TUNNELS {
            if let Err(error) = ensure(&handle, tunnel).await {
                tracing::warn!("{error}");
            }
        }
    }
}

fn open() -> Result<Handle, io::Error> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

async fn index(handle: &Handle, name: &str) -> Option<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.ok().flatten().map(|link| link.header.index)
}

async fn ensure(handle: &Handle, tunnel: Tunnel) -> Result<(), TunnelError> {
    let Tunnel { name, kind, module } = tunnel;
    let builder = match index(handle, name).await {
        Some(index) => LinkMessageBuilder::<LinkUnspec>::new().index(index).up(),
        None => LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::from(kind))
            .name(name)
            .set_info_data(InfoData::IpTunnel(vec![InfoIpTunnel::CollectMetadata]))
            .up(),
    };
    let refused = |source| TunnelError::Refused { name, kind, module, source };
    let message = builder.build();
    if message.header.index == 0 {
        handle.link().add(message).execute().await.map_err(refused)?;
    } else {
        handle.link().set(message).execute().await.map_err(refused)?;
    }
    // Clients do not come from where their answers go: not by this device.
    let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
    if let Err(error) = fs::write(&path, "0") {
        tracing::warn!("{path} cannot be set to 0, and packets from clients may not be let in: {error}");
    }
    Ok(())
}

/// The stricter of what is said of a device and of all holds.
fn warn_of_filter() {
    const ALL: &str = "/proc/sys/net/ipv4/conf/all/rp_filter";
    if fs::read_to_string(ALL).is_ok_and(|text| text.trim() == "1") {
        tracing::warn!(
            "net.ipv4.conf.all.rp_filter is 1: the kernel drops what other nodes dispatch here through tunnels; set it to 0 or 2"
        );
    }
}

/// The names of those that are there. Must not be called in a tokio runtime.
pub fn present() -> io::Result<Vec<&'static str>> {
    ask(async |handle| {
        let mut names = Vec::new();
        for Tunnel { name, .. } in TUNNELS {
            names.extend(index(&handle, name).await.map(|_| name));
        }
        Ok(names)
    })
}

/// Takes one away, if it is there. Must not be called in a tokio runtime.
pub fn remove(name: &str) -> io::Result<()> {
    ask(async |handle| match index(&handle, name).await {
        Some(index) => handle.link().del(index).execute().await.map_err(io::Error::other),
        None => Ok(()),
    })
}

fn ask<T>(question: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { question(open()?).await })
}
