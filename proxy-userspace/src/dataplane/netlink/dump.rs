//! All that netlink says of the node's network, for somebody who was not there.

use std::{
    fmt::{Debug, Write as _},
    net::{Ipv4Addr, Ipv6Addr},
};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{NetlinkError, watcher::on_connection};

/// Links, addresses, routes of every table, rules and neighbours of this network namespace: a line each, as the kernel tells them, after a
/// line that names what they are. For people: the lines are netlink's attributes, with names that may change.
pub async fn dump() -> Result<String, NetlinkError> {
    on_connection(async |handle| {
        let mut text = String::new();
        section(&mut text, "links", handle.link().get().execute()).await?;
        section(&mut text, "addresses", handle.address().get().execute()).await?;
        let v4 = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        let v6 = handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()).execute();
        section(&mut text, "routes", v4.chain(v6)).await?;
        let [v4, v6] = [IpVersion::V4, IpVersion::V6].map(|family| handle.rule().get(family).execute());
        section(&mut text, "rules", v4.chain(v6)).await?;
        section(&mut text, "neighbours", handle.neighbours().get().execute()).await?;
        Ok(text)
    })
    .await
}

async fn section<T: Debug>(
    text: &mut String,
    what: &'static str,
    messages: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<(), NetlinkError> {
    let messages: Vec<T> = messages.try_collect().await.map_err(|source| NetlinkError::List { what, source })?;
    _ = writeln!(text, "# {what}: {}", messages.len());
    for message in messages {
        _ = writeln!(text, "{message:?}");
    }
    Ok(())
}
