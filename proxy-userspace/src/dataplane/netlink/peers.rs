//! Where other nodes are on the links of this one. In: their addresses. Out: the link-layer addresses that the kernel knows for
//! them, whenever these change. So that it knows them before anything is sent, it is asked to resolve those addresses that are
//! on a link, and to keep them resolved (`NTF_EXT_MANAGED`, Linux 5.16); and where there are tunnels, the routers to the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
    },
    sys::SocketAddr,
};
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};

use super::NetlinkError;
use crate::supervise;

/// A link-layer address of Ethernet.
pub type LinkLayerAddress = [u8; 6];

/// Another look now and then: links come, and routes change.
const PERIOD: Duration = Duration::from_secs(30);
/// Until a broken connection is made anew.
const PAUSE: Duration = Duration::from_secs(1);

type Notifications = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// To whom packets are dispatched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// To nodes on a link of this one.
    Links,
    /// To those behind routers, too.
    Routers,
}

/// Follows where other nodes are, from the first time that their addresses are told until the receiver is dropped. Must be called
/// in a tokio runtime.
pub fn watch_peers(
    reach: Reach,
    wanted: watch::Receiver<BTreeSet<IpAddr>>,
) -> mpsc::Receiver<BTreeSet<LinkLayerAddress>> {
    let (sender, receiver) = mpsc::channel(1);
    supervise::spawn("the watch of other nodes on the node's links", move || {
        watch_on(reach, wanted.clone(), sender.clone())
    });
    receiver
}

async fn watch_on(
    reach: Reach,
    mut wanted: watch::Receiver<BTreeSet<IpAddr>>,
    sender: mpsc::Sender<BTreeSet<LinkLayerAddress>>,
) {
    // Nobody has told any addresses yet.
    if wanted.changed().await.is_err() {
        return sender.closed().await;
    }
    while !sender.is_closed() && wanted.has_changed().is_ok() {
        if let Err(error) = follow(reach, &mut wanted, &sender).await {
            tracing::warn!("other nodes on the links of this one cannot be watched: {error}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Watches over one connection, until that breaks or nobody listens.
async fn follow(
    reach: Reach,
    wanted: &mut watch::Receiver<BTreeSet<IpAddr>>,
    sender: &mpsc::Sender<BTreeSet<LinkLayerAddress>>,
) -> Result<(), NetlinkError> {
    let (connection, handle, mut notifications) = rtnetlink::new_multicast_connection(&[MulticastGroup::Neigh])?;
    let connection = tokio::spawn(connection);
    let (mut told, mut kept, mut places) = (None, BTreeMap::new(), BTreeMap::new());
    let mut resolves = true;
    // Of its own beat: news of those that the kernel keeps come more often.
    let mut looks = tokio::time::interval(PERIOD);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let result = loop {
        let addresses = wanted.borrow_and_update().clone();
        let known = match neighbours(&handle, &addresses).await {
            Ok(known) => known,
            Err(error) => break Err(error),
        };
        if resolves {
            keep(&handle, reach, &addresses, &known, &mut kept).await;
        }
        // One that does not answer for a moment is where it was.
        places.retain(|(_, address), _| addresses.contains(address));
        let found = known.iter().filter_map(|neighbour| Some(((neighbour.ifindex, neighbour.address), neighbour.mac?)));
        places.extend(found);
        let macs: BTreeSet<LinkLayerAddress> = places.values().copied().collect();
        if told.as_ref() != Some(&macs) {
            told = Some(macs.clone());
            let _ = sender.send(macs).await;
        }
        resolves = tokio::select! {
            () = sender.closed() => break Ok(()),
            changed = wanted.changed() => match changed {
                Ok(()) => true,
                Err(_) => break Ok(()),
            },
            _ = looks.tick() => true,
            is_open = next(&mut notifications, &addresses) => if is_open { false } else { break Ok(()) },
        };
    };
    connection.abort();
    result
}

/// Waits for news of any of these addresses. `false` when the connection broke.
async fn next(notifications: &mut Notifications, addresses: &BTreeSet<IpAddr>) -> bool {
    let mut is_news = false;
    while !is_news {
        let Some((message, _)) = notifications.next().await else { return false };
        is_news = concerns(&message, addresses);
        while let Some(Some((message, _))) = notifications.next().now_or_never() {
            is_news |= concerns(&message, addresses);
        }
    }
    true
}

fn concerns(message: &NetlinkMessage<RouteNetlinkMessage>, addresses: &BTreeSet<IpAddr>) -> bool {
    use RouteNetlinkMessage::{DelNeighbour, NewNeighbour};
    match &message.payload {
        NetlinkPayload::InnerMessage(NewNeighbour(neighbour) | DelNeighbour(neighbour)) => {
            Neighbour::of(neighbour).is_some_and(|neighbour| addresses.contains(&neighbour.address))
        }
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// What the kernel knows of an address on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Neighbour {
    ifindex: u32,
    address: IpAddr,
    mac: Option<LinkLayerAddress>,
    /// The kernel keeps it resolved already, or somebody has written it down for good.
    is_kept: bool,
}

impl Neighbour {
    fn of(message: &NeighbourMessage) -> Option<Self> {
        let (mut address, mut mac, mut is_kept) = (None, None, message.header.state == NeighbourState::Permanent);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
                NeighbourAttribute::LinkLayerAddress(octets) => mac = octets.as_slice().try_into().ok(),
                NeighbourAttribute::ExtFlags(flags) => is_kept |= flags.contains(NeighbourExtFlags::Managed),
                _ => {}
            }
        }
        let is_lost = matches!(message.header.state, NeighbourState::Failed | NeighbourState::Incomplete);
        let mac = mac.filter(|mac| !is_lost && *mac != [0; 6]);
        Some(Self { ifindex: message.header.ifindex, address: address?, mac, is_kept })
    }
}

/// What the kernel knows of these addresses.
async fn neighbours(handle: &Handle, addresses: &BTreeSet<IpAddr>) -> Result<Vec<Neighbour>, NetlinkError> {
    let mut known = Vec::new();
    if addresses.is_empty() {
        return Ok(known);
    }
    let mut stream = handle.neighbours().get().execute();
    let failed = |source| NetlinkError::List { what: "neighbours", source };
    while let Some(message) = stream.try_next().await.map_err(failed)? {
        known.extend(Neighbour::of(&message).filter(|neighbour| addresses.contains(&neighbour.address)));
    }
    Ok(known)
}

/// Has the kernel keep those that are on a link, and no longer those that are not wanted any more. What it refuses is tried
/// again with the next look.
async fn keep(
    handle: &Handle,
    reach: Reach,
    addresses: &BTreeSet<IpAddr>,
    known: &[Neighbour],
    kept: &mut BTreeMap<IpAddr, u32>,
) {
    let is_kept = |address| known.iter().any(|neighbour| neighbour.address == address && neighbour.is_kept);
    let mut wanted = BTreeMap::new();
    // One that is kept may have moved behind a router since.
    for address in addresses.iter().copied().filter(|address| reach == Reach::Routers || !is_kept(*address)) {
        let next_hop = next_hop(handle, address).await;
        wanted.extend(next_hop.filter(|(next, _)| *next == address || reach == Reach::Routers));
    }
    for (address, ifindex) in wanted.iter().filter(|(address, _)| !is_kept(**address)) {
        let mut request = handle.neighbours().add(*ifindex, *address).state(NeighbourState::None).replace();
        request.message_mut().header.flags = NeighbourFlags::empty();
        request.message_mut().attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        match request.execute().await {
            Ok(()) => drop(kept.insert(*address, *ifindex)),
            Err(error) => tracing::debug!("the kernel does not keep {address} resolved: {error}"),
        }
    }
    let is_wanted = |address: &IpAddr| addresses.contains(address) || wanted.contains_key(address);
    let unwanted: Vec<_> = kept.iter().filter(|(address, _)| !is_wanted(address)).map(|(a, i)| (*a, *i)).collect();
    for (address, ifindex) in unwanted {
        kept.remove(&address);
        let message = handle.neighbours().add(ifindex, address).message_mut().clone();
        if let Err(error) = handle.neighbours().del(message).execute().await {
            tracing::debug!("{address} stays a neighbour: {error}");
        }
    }
}

/// The next hop on the way to an address, which may be itself, and the link it is on.
async fn next_hop(handle: &Handle, address: IpAddr) -> Option<(IpAddr, u32)> {
    let request = match address {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(v4, 32).build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6, 128).build(),
    };
    let mut stream = Box::pin(handle.route().get(request).execute());
    first_hop(&stream.try_next().await.ok()??, address)
}

fn first_hop(route: &RouteMessage, address: IpAddr) -> Option<(IpAddr, u32)> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut next, mut link) = (address, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(v4)) => next = IpAddr::V4(*v4),
            RouteAttribute::Gateway(RouteAddress::Inet6(v6)) | RouteAttribute::Via(RouteVia::Inet6(v6)) => {
                next = IpAddr::V6(*v6);
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
            RouteAttribute::Oif(ifindex) => link = Some(*ifindex),
            _ => {}
        }
    }
    Some((next, link?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(state: NeighbourState, mac: Option<LinkLayerAddress>) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 3;
        message.header.state = state;
        message.attributes = vec![NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 2].into()))];
        message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.into())));
        message
    }

    #[test]
    fn a_neighbour_has_an_address_on_the_link_only_while_the_kernel_believes_in_it() {
        let mac = [2, 0, 0, 0, 0, 1];
        let cases = [
            (NeighbourState::Reachable, Some(mac), Some(mac)),
            (NeighbourState::Stale, Some(mac), Some(mac)),
            (NeighbourState::Failed, Some(mac), None),
            (NeighbourState::Incomplete, None, None),
            (NeighbourState::Noarp, Some([0; 6]), None),
        ];
        for (state, mac, expected) in cases {
            let neighbour = Neighbour::of(&message(state, mac)).unwrap();
            assert_eq!((neighbour.mac, neighbour.is_kept), (expected, false), "{state:?}");
        }
        let mut kept = message(NeighbourState::Stale, Some(mac));
        kept.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        assert!(Neighbour::of(&kept).unwrap().is_kept);
        assert!(Neighbour::of(&message(NeighbourState::Permanent, Some(mac))).unwrap().is_kept);
    }

    #[test]
    fn an_address_is_its_own_next_hop_if_there_is_no_gateway_to_it() {
        let address = IpAddr::from([10, 0, 0, 2]);
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![RouteAttribute::Oif(2)];
        assert_eq!(first_hop(&route, address), Some((address, 2)));
        route.header.kind = RouteType::Local;
        assert_eq!(first_hop(&route, address), None, "the node's own");
        route.header.kind = RouteType::Unicast;
        let gateway = std::net::Ipv4Addr::new(10, 0, 0, 1);
        route.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(gateway)));
        assert_eq!(first_hop(&route, address), Some((gateway.into(), 2)));
    }
}
