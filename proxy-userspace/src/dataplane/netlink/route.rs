//! Which way the kernel would send a packet: what `ip route get` asks.

use std::net::IpAddr;

use futures::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAttribute, RouteMessage},
};

use super::NetlinkError;

/// Index of the device by which an address is reached from here; none when no route leads there.
pub async fn device_towards(address: IpAddr) -> Result<Option<u32>, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let mut answer = handle.route().get(question(address)).execute();
    let found = answer.try_next().await;
    connection.abort();
    match found {
        Ok(message) => Ok(message.as_ref().and_then(device)),
        // The kernel says by an error that there is no way.
        Err(rtnetlink::Error::NetlinkError(error)) if is_no_way(error.raw_code()) => Ok(None),
        Err(source) => Err(NetlinkError::List { what: "routes", source }),
    }
}

fn is_no_way(code: i32) -> bool {
    [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL].contains(&-code)
}

fn question(address: IpAddr) -> RouteMessage {
    match address {
        IpAddr::V4(v4) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(v4, 32).build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(v6, 128).build(),
    }
}

fn device(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(ifindex) => Some(*ifindex),
        _ => None,
    })
}
