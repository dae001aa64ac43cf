//! The kernel's tables of nftables: which there are and what their chains are called, those of iptables among them where its backend is
//! nftables; and the removal of one. Out of the network namespace of the calling thread.

use std::io;

use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{ChainAttribute, ChainMessage, NfTablesMessage, TableAttribute, TableMessage},
    none::ControlMessage,
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_NETFILTER,
};

use super::exchange::Exchange;

/// Whom a batch of messages is for (`NFNL_SUBSYS_NFTABLES` of `linux/netfilter/nfnetlink.h`).
const NFTABLES: u16 = 10;

/// A chain, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Family of its table.
    pub(crate) family: NetfilterProtoFamily,
    /// Name of its table.
    pub(crate) table: String,
    /// Its own.
    pub(crate) name: String,
}

/// Families and names of all tables. None where the kernel knows no nftables.
pub(crate) fn tables() -> io::Result<Vec<(NetfilterProtoFamily, String)>> {
    let mut found = Vec::new();
    list(NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() }), |family, message| {
        let NfTablesMessage::NewTable(table) = message else { return };
        let name = table.attributes.into_iter().find_map(|attribute| match attribute {
            TableAttribute::Name(name) => Some(name),
            _ => None,
        });
        found.extend(name.map(|name| (family, name)));
    })?;
    Ok(found)
}

/// All chains of all tables. None where the kernel knows no nftables.
pub(crate) fn chains() -> io::Result<Vec<Chain>> {
    let mut found = Vec::new();
    list(NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }), |family, message| {
        let NfTablesMessage::NewChain(chain) = message else { return };
        let (mut table, mut name) = (String::new(), String::new());
        for attribute in chain.attributes {
            match attribute {
                ChainAttribute::Table(text) => table = text,
                ChainAttribute::Name(text) => name = text,
                _ => {}
            }
        }
        found.push(Chain { family, table, name });
    })?;
    Ok(found)
}

/// Removes a table with everything in it, at once or not at all.
pub(crate) fn delete_table(family: NetfilterProtoFamily, name: &str) -> io::Result<()> {
    let exchange = Exchange::open(NETLINK_NETFILTER)?;
    let batch = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES);
    let table = TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] };
    exchange.send_together([
        (NLM_F_REQUEST, NetfilterMessage::new(batch.clone(), ControlMessage::BatchBegin)),
        (NLM_F_REQUEST | NLM_F_ACK, NetfilterMessage::new(header(family), NfTablesMessage::DeleteTable(table))),
        (NLM_F_REQUEST, NetfilterMessage::new(batch, ControlMessage::BatchEnd)),
    ])?;
    exchange.receive::<NetfilterMessage>(drop)
}

fn header(family: NetfilterProtoFamily) -> NetfilterHeader {
    NetfilterHeader::new(family, 0, 0)
}

fn list(question: NfTablesMessage, mut take: impl FnMut(NetfilterProtoFamily, NfTablesMessage)) -> io::Result<()> {
    let exchange = Exchange::open(NETLINK_NETFILTER)?;
    exchange.send(NLM_F_REQUEST | NLM_F_DUMP, NetfilterMessage::new(header(NetfilterProtoFamily::Unspec), question))?;
    let answered = exchange.receive::<NetfilterMessage>(|message| {
        if let NetfilterMessageInner::NfTables(inner) = message.inner {
            take(message.header.family, inner);
        }
    });
    match answered.as_ref().map_err(io::Error::raw_os_error) {
        // No part of the kernel takes such messages.
        Err(Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(()),
        _ => answered,
    }
}
