//! Follows the kernel's notifications. Each one is a hint only: what is sent on is read anew from the kernel, so a lost
//! notification (ENOBUFS) costs a read and nothing else.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::SocketAddr,
};
use tokio::sync::mpsc;

use super::{
    NetlinkError, NetworkEvent, NodeNetwork,
    messages::{Effect, Neighbours, address, default_route_links, link},
};
use crate::supervise;

const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// Until a broken connection is made anew.
const PAUSE: Duration = Duration::from_secs(1);

/// Events that wait for a slow reader. Beyond it the kernel's own queue fills.
const QUEUE: usize = 16;

/// Notifications of one connection, in the order the kernel sent them.
type Notifications = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// The network of this namespace as it is now.
pub async fn snapshot() -> Result<NodeNetwork, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let network = read(&handle).await;
    connection.abort();
    network
}

/// Watches the network of this namespace until the receiver is dropped. The first event is [`NetworkEvent::Changed`].
/// Must be called in a tokio runtime.
pub fn watch() -> mpsc::Receiver<NetworkEvent> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    supervise::spawn("the watch of the node's network", move || watch_on(sender.clone()));
    receiver
}

async fn watch_on(sender: mpsc::Sender<NetworkEvent>) {
    let mut last = None;
    while !sender.is_closed() {
        if let Err(error) = follow(&sender, &mut last).await {
            tracing::warn!("the node's network cannot be watched: {error}");
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = sender.closed() => {}
        }
    }
}

/// Watches over one connection, until that breaks or nobody listens. Subscribes before it reads, so that no change falls
/// in between.
async fn follow(sender: &mpsc::Sender<NetworkEvent>, last: &mut Option<NodeNetwork>) -> Result<(), NetlinkError> {
    let (connection, handle, mut notifications) = rtnetlink::new_multicast_connection(&GROUPS)?;
    let connection = tokio::spawn(connection);
    let mut neighbours = Neighbours::default();
    let mut effect = Effect { network: true, routes: last.is_some() };
    let result = loop {
        if let Err(error) = tell(sender, &handle, last, effect).await {
            break Err(error);
        }
        effect = tokio::select! {
            () = sender.closed() => break Ok(()),
            effect = next_effect(&mut notifications, &mut neighbours) => match effect {
                Some(effect) => effect,
                None => break Ok(()),
            },
        };
    };
    connection.abort();
    result
}

async fn tell(
    sender: &mpsc::Sender<NetworkEvent>,
    handle: &Handle,
    last: &mut Option<NodeNetwork>,
    effect: Effect,
) -> Result<(), NetlinkError> {
    if effect.network {
        let network = read(handle).await?;
        if last.as_ref() != Some(&network) {
            *last = Some(network.clone());
            let _ = sender.send(NetworkEvent::Changed(network)).await;
        }
    }
    if effect.routes {
        let _ = sender.send(NetworkEvent::RoutesChanged).await;
    }
    Ok(())
}

/// What the notifications that are queued call for, together; waits for one that calls for anything. None when the
/// connection broke.
async fn next_effect(notifications: &mut Notifications, neighbours: &mut Neighbours) -> Option<Effect> {
    let mut effect = Effect::NOTHING;
    while effect == Effect::NOTHING {
        effect = effect_of(&notifications.next().await?.0, neighbours);
        while let Some(Some((message, _))) = notifications.next().now_or_never() {
            effect = effect.or(effect_of(&message, neighbours));
        }
    }
    Some(effect)
}

fn effect_of(message: &NetlinkMessage<RouteNetlinkMessage>, neighbours: &mut Neighbours) -> Effect {
    match &message.payload {
        NetlinkPayload::InnerMessage(message) => neighbours.effect(message),
        // Notifications were lost: anything may have happened.
        NetlinkPayload::Overrun(_) => Effect::ALL,
        _ => Effect::NOTHING,
    }
}

async fn read(handle: &Handle) -> Result<NodeNetwork, NetlinkError> {
    let failed = |what| move |source| NetlinkError::List { what, source };
    let mut links = Vec::new();
    let mut stream = handle.link().get().execute();
    while let Some(message) = stream.try_next().await.map_err(failed("links"))? {
        links.push(link(&message));
    }
    let mut addresses = Vec::new();
    let mut stream = handle.address().get().execute();
    while let Some(message) = stream.try_next().await.map_err(failed("addresses"))? {
        addresses.extend(address(&message));
    }
    let with_default_route = default_routes(handle).await.map_err(failed("routes"))?;
    for link in &mut links {
        link.has_default_route = with_default_route.contains(&link.ifindex);
    }
    links.sort_by_key(|link| link.ifindex);
    addresses.sort();
    Ok(NodeNetwork { links, addresses })
}

async fn default_routes(handle: &Handle) -> Result<BTreeSet<u32>, rtnetlink::Error> {
    let mut links = BTreeSet::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let mut stream = handle.route().get(family).execute();
        while let Some(message) = stream.try_next().await? {
            default_route_links(&message, &mut links);
        }
    }
    Ok(links)
}
