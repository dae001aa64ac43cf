//! Follows the kernel's notifications. Each one is a hint only: what is sent on is read anew from the kernel, so a lost
//! notification (ENOBUFS) costs a read and nothing else.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    thread,
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

/// In its mode ipvs kube-proxy gives this device the addresses of all Services (`defaultDummyDevice` of `pkg/proxy/ipvs/proxier.go`).
pub const SERVICE_DEVICE: &str = "kube-ipvs0";

/// Devices that other proxies give the addresses of all Services: kube-proxy's, and kube-router's.
const SERVICE_DEVICES: [&str; 2] = [SERVICE_DEVICE, "kube-dummy-if"];

/// Notifications of one connection, in the order the kernel sent them.
type Notifications = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// [`snapshot`] on a thread of its own: for callers that must not wait for tasks, whether or not they are of a runtime.
pub fn snapshot_blocking() -> io::Result<NodeNetwork> {
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(snapshot()).map_err(io::Error::other)
        });
        asking.join().unwrap_or_else(|_panic| Err(io::Error::other("the thread that asked has panicked")))
    })
}

/// The network of this namespace as it is now.
pub async fn snapshot() -> Result<NodeNetwork, NetlinkError> {
    on_connection(async |handle| read(&handle).await).await
}

/// Asks over a connection that is closed when all is answered.
pub(super) async fn on_connection<T>(
    ask: impl AsyncFnOnce(Handle) -> Result<T, NetlinkError>,
) -> Result<T, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let answer = ask(handle).await;
    connection.abort();
    answer
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
    Ok(without_services(NodeNetwork { links, addresses }))
}

/// Addresses of Services are none of the node's, whoever has them bound to a device: NodePorts are not served there, and no Service is
/// refused for having one.
fn without_services(mut network: NodeNetwork) -> NodeNetwork {
    let devices = SERVICE_DEVICES.map(|name| network.link(name).map(|link| link.ifindex));
    network.addresses.retain(|address| !devices.contains(&Some(address.ifindex)));
    network
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

#[cfg(test)]
mod tests {
    use super::{
        super::{Link, LinkAddress},
        NodeNetwork, SERVICE_DEVICE, without_services,
    };

    #[test]
    fn addresses_that_another_proxy_has_bound_for_services_are_not_the_nodes() {
        let link = |ifindex, name: &str| Link { ifindex, name: name.into(), ..Link::default() };
        let address = |ifindex, net: &str| LinkAddress {
            ifindex,
            net: net.parse().unwrap(),
            is_global: true,
            is_secondary: false,
            is_usable: true,
            is_deprecated: false,
        };
        let network = NodeNetwork {
            links: vec![link(2, "eth0"), link(3, SERVICE_DEVICE), link(4, "kube-bridge"), link(5, "kube-dummy-if")],
            addresses: vec![
                address(2, "192.0.2.9/24"),
                address(3, "10.96.0.1/32"),
                address(4, "10.244.1.1/24"),
                address(5, "10.96.0.2/32"),
            ],
        };
        let own: Vec<u32> = without_services(network.clone()).addresses.iter().map(|address| address.ifindex).collect();
        assert_eq!(own, [2, 4]);
        let without = NodeNetwork { links: vec![link(2, "eth0")], ..network };
        assert_eq!(without_services(without.clone()), without);
    }
}
