//! What kube-proxy's mode ipvs leaves beside rules of iptables: the device that bears the addresses of Services, the kernel's virtual
//! services, and sets. Evidence: `pkg/proxy/ipvs/{proxier,ipset,cleanup}.go` of kubernetes 1.36.

mod services;
mod sets;

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::{address::AddressAttribute, link::LinkAttribute};

pub(super) use self::{services::VirtualService, sets::is_own as is_set};
use super::tool::{self, ToolError};
use crate::dataplane::netlink::SERVICE_DEVICE as DEVICE;

/// The rules that ask a set are gone a moment after they were taken out.
const PATIENCE: (u32, Duration) = (50, Duration::from_millis(100));

/// What there is.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The device, by its index, and its addresses.
    pub(super) device: Option<(u32, Vec<IpAddr>)>,
    /// Virtual services at those addresses, and those that serve NodePorts.
    pub(super) services: Vec<VirtualService>,
    /// How many virtual services are somebody else's.
    pub(super) foreign: usize,
    /// Connections that virtual services have.
    pub(super) connections: usize,
    /// Names of sets.
    pub(super) sets: Vec<String>,
    /// What could not be looked at, with advice.
    pub(super) problems: Vec<String>,
}

/// Looks for all of it. `is_likely` says that rules are of this mode, or ask its sets.
pub(super) fn find(is_likely: bool) -> Found {
    let mut found = Found::default();
    match device() {
        Ok(device) => found.device = device,
        Err(error) => found.problems.push(format!("device {DEVICE} cannot be looked for: {error}")),
    }
    let members = found.look_at_sets(is_likely);
    found.look_at_services(&members);
    found
}

impl Found {
    /// Returns the NodePorts that the sets name.
    fn look_at_sets(&mut self, is_likely: bool) -> BTreeSet<(&'static str, u16)> {
        match tool::run("ipset", &["save"], "") {
            Ok(text) => {
                self.sets = sets::own(&text);
                sets::node_ports(&text)
            }
            Err(ToolError::Missing(_)) => {
                if is_likely || self.device.is_some() {
                    self.problems.push(
                        "there are sets of kube-proxy's, and there is no ipset here: run this on the node itself, with the packages \
                         ipset and ipvsadm"
                            .into(),
                    );
                }
                BTreeSet::new()
            }
            Err(error) => {
                // Kernels without sets have none.
                if is_likely {
                    self.problems.push(format!("sets cannot be read: {error}"));
                }
                BTreeSet::new()
            }
        }
    }

    fn look_at_services(&mut self, node_ports: &BTreeSet<(&'static str, u16)>) {
        let all = services::parse(&fs::read_to_string("/proc/self/net/ip_vs").unwrap_or_default());
        let bound: &[IpAddr] = self.device.as_ref().map_or(&[], |(_, addresses)| addresses);
        let is_own = |service: &VirtualService| {
            bound.contains(&service.address.ip()) || node_ports.contains(&(service.protocol, service.address.port()))
        };
        let (own, foreign): (Vec<_>, Vec<_>) = all.into_iter().partition(is_own);
        (self.services, self.foreign) = (own, foreign.len());
        let connections = fs::read_to_string("/proc/self/net/ip_vs_conn").unwrap_or_default();
        let at: BTreeSet<SocketAddr> = self.services.iter().map(|service| service.address).collect();
        self.connections = services::connections(&connections, &at);
    }
}

/// Runs on a connection to rtnetlink. Must not be called in a tokio runtime.
fn with_netlink<T>(work: impl AsyncFnOnce(rtnetlink::Handle) -> Result<T, rtnetlink::Error>) -> io::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        work(handle).await.map_err(io::Error::other)
    })
}

fn device() -> io::Result<Option<(u32, Vec<IpAddr>)>> {
    with_netlink(async |handle| {
        let mut links = handle.link().get().execute();
        let mut index = None;
        while let Some(link) = links.try_next().await? {
            let is_it = |attribute: &_| matches!(attribute, LinkAttribute::IfName(name) if name == DEVICE);
            if link.attributes.iter().any(is_it) {
                index = Some(link.header.index);
            }
        }
        let Some(index) = index else { return Ok(None) };
        let mut found = Vec::new();
        let mut addresses = handle.address().get().set_link_index_filter(index).execute();
        while let Some(message) = addresses.try_next().await? {
            found.extend(message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            }));
        }
        Ok(Some((index, found)))
    })
}

/// Takes the device away, and its addresses with it.
pub(super) fn remove_device(index: u32) -> Result<(), String> {
    with_netlink(async |handle| handle.link().del(index).execute().await)
        .map_err(|error| format!("device {DEVICE} is still there: {error}"))
}

/// Takes virtual services away, one after the other.
pub(super) fn remove_services(services: &[VirtualService]) -> Result<(), String> {
    services.iter().enumerate().try_for_each(|(done, service)| {
        let address = service.address.to_string();
        let result = tool::run("ipvsadm", &["--delete-service", service.option(), &address], "").map(drop);
        result.map_err(|error| {
            let left = format!("virtual services from {service} on, {} in all, are still there", services.len() - done);
            match error {
                ToolError::Missing(_) => {
                    format!("{left}, and there is no ipvsadm here: run this on the node itself, with that package")
                }
                error => format!("{left}: {error}"),
            }
        })
    })
}

/// Takes a set away, as soon as no rule asks it any more.
pub(super) fn remove_set(name: &str) -> Result<(), String> {
    let (times, pause) = PATIENCE;
    let mut result = tool::run("ipset", &["destroy", name], "");
    for _ in 0..times {
        match &result {
            Err(ToolError::Refused { reason, .. }) if reason.contains("in use") => thread::sleep(pause),
            _ => break,
        }
        result = tool::run("ipset", &["destroy", name], "");
    }
    result.map(drop).map_err(|error| format!("set {name} is still there: {error}"))
}
