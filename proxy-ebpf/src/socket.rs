//! A socket's way: at `connect` and `sendmsg` a frontend becomes a backend, once per connection and without any work per
//! packet; at `recvmsg` and `getpeername` the backend becomes the frontend again, because that is whom the application
//! named. TCP of all sockets, UDP only of the node's own: a pod's UDP is translated per packet, where it can leave a dead
//! backend. A pod's TCP is, too, where the rule needs to know its packets: see `takes_packets`.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_ANY,
    helpers::generated as helpers,
    programs::{SockAddrContext, SockContext},
};
use proxy_common::{
    addr::{Address, Port, Protocol},
    node::{masquerade, newcomers},
    outcome::{Hook, Outcome},
    service::{Pick, Service, flag},
    socket::{SocketOrigin, SocketPeer, SocketTarget, SocketWay},
    tuple::{Stage, Tuple},
};

use crate::{
    choose::choose,
    connection,
    counters::count,
    event,
    family::{Family, V4, V6},
    kernel::{self, HOST_NETNS_COOKIE, SOCKET_LB},
    newcomer,
    peer::{self, Peer, load, mapped, peer4, peer6, set_mapped_peer, set_peer4, set_peer6, source4, source6},
    service, stats,
};

/// Whether the system call goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// With the address as it now is.
    GoOn,
    /// It fails, with the error that was set.
    Refuse,
}

/// A socket that is balanced here.
#[derive(Clone, Copy)]
struct Caller {
    protocol: Protocol,
    /// It is in the node's own network namespace.
    is_node: bool,
}

const GO_ON: Answer = Answer::GoOn;
const EADDRNOTAVAIL: i32 = 99;
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// `connect` to an IPv4 address.
#[inline(always)]
pub fn connect4(context: &SockAddrContext) -> Answer {
    let peer = peer4(context);
    let Some(caller) = balanced(context, &peer.addr) else { return GO_ON };
    translate::<V4>(context, Hook::Connect, caller, peer, source4, set_peer4)
}

/// `connect` to an IPv6 address, which may be an IPv4 one in IPv6's clothes.
#[inline(always)]
pub fn connect6(context: &SockAddrContext) -> Answer {
    let peer = peer6(context);
    let Some(peer) = mapped(&peer) else {
        let Some(caller) = balanced(context, &peer.addr) else { return GO_ON };
        return translate::<V6>(context, Hook::Connect, caller, peer, source6, set_peer6);
    };
    let Some(caller) = balanced(context, &peer.addr) else { return GO_ON };
    translate::<V4>(context, Hook::Connect, caller, peer, source4, set_mapped_peer)
}

/// `sendmsg` of an unconnected socket to an IPv4 address.
#[inline(always)]
pub fn sendmsg4(context: &SockAddrContext) -> Answer {
    let peer = peer4(context);
    let Some(caller) = balanced(context, &peer.addr) else { return GO_ON };
    translate_datagram::<V4>(context, caller, peer, source4, set_peer4)
}

/// `sendmsg` of an unconnected socket to an IPv6 address. A mapped IPv4 address comes by `sendmsg4`.
#[inline(always)]
pub fn sendmsg6(context: &SockAddrContext) -> Answer {
    let peer = peer6(context);
    let Some(caller) = balanced(context, &peer.addr) else { return GO_ON };
    translate_datagram::<V6>(context, caller, peer, source6, set_peer6)
}

/// `recvmsg` and `getpeername` of an IPv4 socket.
#[inline(always)]
pub fn name_peer4(context: &SockAddrContext) {
    name_peer::<V4>(context, peer4(context), set_peer4);
}

/// `recvmsg` and `getpeername` of an IPv6 socket.
#[inline(always)]
pub fn name_peer6(context: &SockAddrContext) {
    let peer = peer6(context);
    match mapped(&peer) {
        Some(peer) => name_peer::<V4>(context, peer, set_mapped_peer),
        None => name_peer::<V6>(context, peer, set_peer6),
    }
}

/// A socket is closed: its last descriptor is gone.
#[inline(always)]
pub fn release(context: &SockContext) {
    // SAFETY: only the place of the field is taken.
    let family = load(unsafe { &raw const (*context.sock).family });
    forget(cookie(context), family);
}

/// The socket, if its like are balanced here. To a pod, a loopback address means the pod, and the
/// unspecified one does too.
#[inline(always)]
fn balanced<A: Address>(context: &SockAddrContext, peer: &A) -> Option<Caller> {
    let scope = SOCKET_LB.load();
    if scope == 0 {
        return None;
    }
    // SAFETY: a helper on the program's own context.
    let is_node = unsafe { helpers::bpf_get_netns_cookie(context.as_ptr()) } == HOST_NETNS_COOKIE.load();
    match peer::protocol(context) {
        6 if is_node || scope > 1 && !peer.is_loopback() && *peer != A::ANY => {
            Some(Caller { protocol: Protocol::Tcp, is_node })
        }
        17 if is_node => Some(Caller { protocol: Protocol::Udp, is_node }),
        _ => None,
    }
}

/// Whether pods' connections to this Service are left to `pod_in`. Affinity, source ranges and a hash of the client need the
/// client's address, which an unbound socket has none of yet; and who is masqueraded at an external address, or at all,
/// depends on where the backend is and has to be undone on the way back.
#[inline(always)]
fn takes_packets(service: &Service) -> bool {
    service.flags & (flag::EXTERNAL | flag::AFFINITY | flag::SOURCE_RANGES) != 0
        || matches!(service.pick, Pick::SourceHash)
        || service::node().is_none_or(|node| node.flags & masquerade::ALL != 0)
}

/// Gives the socket a backend of the Service it names, if it names one.
#[inline(always)]
fn translate<F: Family>(
    context: &SockAddrContext,
    hook: Hook,
    caller: Caller,
    peer: Peer<F::Addr>,
    source: fn(&SockAddrContext) -> F::Addr,
    set_peer: fn(&SockAddrContext, Peer<F::Addr>),
) -> Answer {
    let peer = peer.meant();
    if is_left::<F>(context, hook, caller, &peer) {
        return leave(context, hook);
    }
    let Some(service) = service::find::<F>(peer.addr, peer.port, caller.protocol) else {
        return service::refusal::<F>(&peer.addr)
            .map_or_else(|| leave(context, hook), |reason| refuse::<F>(hook, reason, peer, caller.protocol));
    };
    // What crosses the families does so packet by packet.
    if service.flags & flag::CROSS != 0 || !caller.is_node && takes_packets(service) {
        return leave(context, hook);
    }
    let Some(key) = question::<F>(&peer, caller.protocol) else { return leave(context, hook) };
    let (id, chosen) = match choose::<F>(service, &key) {
        Ok(chosen) => chosen,
        Err(reason) => return refuse::<F>(hook, reason, peer, caller.protocol),
    };
    // The kernel would say EINVAL to such an IPv4 socket, and let the packets of an IPv6 one out for others to drop.
    if caller.is_node && source(context).is_loopback() && !service::is_of_node::<F>(&chosen.addr) {
        return refuse::<F>(hook, Outcome::DropMartian, peer, caller.protocol);
    }
    let cookie = cookie(context);
    if matches!(hook, Hook::Connect) {
        forget(cookie, peer::family(context));
    }
    let frontend = SocketTarget {
        addr: peer.addr,
        port: peer.port,
        proto: caller.protocol,
        origin: if matches!(hook, Hook::Sendmsg) { SocketOrigin::Sent } else { SocketOrigin::Connected },
        backend: id,
        backend_generation: chosen.generation,
        service: service.index,
        netns: netns(context),
    };
    let backend = SocketTarget { addr: chosen.addr, port: chosen.port, ..frontend };
    let from_backend = SocketPeer::new(cookie, backend.addr, backend.port, SocketWay::ToFrontend);
    let _ = F::sockets().insert(&from_backend, &frontend, u64::from(BPF_ANY));
    // A connected socket may name its peer in `sendmsg` all the same, and hears from that backend only.
    if matches!(caller.protocol, Protocol::Udp) {
        let to_backend = SocketPeer::new(cookie, peer.addr, peer.port, SocketWay::ToBackend);
        let _ = F::sockets().insert(&to_backend, &backend, u64::from(BPF_ANY));
    }
    if matches!(hook, Hook::Connect) {
        connection::note::<F>(cookie, &backend);
    }
    set_peer(context, Peer { addr: backend.addr, port: backend.port });
    count(hook, Outcome::Opened);
    event::socket::<F>(hook, Outcome::Opened, &frontend);
    stats::opened::<F>(service.index, id);
    GO_ON
}

/// Whether whom the socket names is left to the proxy beside us: a connection is new, but a datagram may be of those that it
/// has sent before. The address it leaves with is not known yet.
#[inline(always)]
fn is_left<F: Family>(context: &SockAddrContext, hook: Hook, caller: Caller, peer: &Peer<F::Addr>) -> bool {
    let flags = service::node().map_or(0, |node| node.flags);
    if !matches!(hook, Hook::Sendmsg) || flags & (newcomers::LEAVE | newcomers::LOOK) == 0 {
        return flags & newcomers::LEAVE != 0;
    }
    let sport = peer::source_port(context);
    let key = Tuple::new(F::Addr::ANY, peer.addr, sport, peer.port, caller.protocol, Stage::FromPod);
    newcomer::is_foreign::<F>(&key)
}

/// Lets the system call go on with the address it has.
#[inline(always)]
fn leave(context: &SockAddrContext, hook: Hook) -> Answer {
    if matches!(hook, Hook::Connect) {
        forget(cookie(context), peer::family(context));
    }
    GO_ON
}

/// Forgets whom a socket was connected to. One of IPv6 may have been connected to a mapped address.
#[inline(always)]
fn forget(cookie: u64, family: u32) {
    connection::forget::<V4>(cookie);
    if family == u32::from(V6::NUMBER) {
        connection::forget::<V6>(cookie);
    }
}

/// A new flow as the choice of a backend sees it. The client is the node, by the address it shows to others; the port is
/// not known yet, and a random one spreads as well.
#[inline(always)]
fn question<F: Family>(peer: &Peer<F::Addr>, protocol: Protocol) -> Option<Tuple<F::Addr>> {
    let saddr = F::masquerade(service::node()?);
    let sport = Port { octets: (kernel::random() as u16).to_ne_bytes() };
    Some(Tuple::new(saddr, peer.addr, sport, peer.port, protocol, Stage::FromPod))
}

/// Datagrams of one socket to one frontend stay with one backend while it serves.
#[inline(always)]
fn translate_datagram<F: Family>(
    context: &SockAddrContext,
    caller: Caller,
    peer: Peer<F::Addr>,
    source: fn(&SockAddrContext) -> F::Addr,
    set_peer: fn(&SockAddrContext, Peer<F::Addr>),
) -> Answer {
    let peer = peer.meant();
    let key = SocketPeer::new(cookie(context), peer.addr, peer.port, SocketWay::ToBackend);
    // SAFETY: an entry may be given to another socket after an eviction, not one looked up a moment ago.
    if let Some(known) = unsafe { F::sockets().get(&key) } {
        if service::still_serves::<F>(known.backend, known.backend_generation) {
            set_peer(context, Peer { addr: known.addr, port: known.port });
            return GO_ON;
        }
        count(Hook::Sendmsg, Outcome::Moved);
        let left = SocketTarget { addr: peer.addr, port: peer.port, ..*known };
        event::socket::<F>(Hook::Sendmsg, Outcome::Moved, &left);
        let _ = F::sockets().remove(&key);
    }
    translate::<F>(context, Hook::Sendmsg, caller, peer, source, set_peer)
}

/// Shows the application the frontend it named in place of the backend it got.
#[inline(always)]
fn name_peer<F: Family>(context: &SockAddrContext, peer: Peer<F::Addr>, set_peer: fn(&SockAddrContext, Peer<F::Addr>)) {
    let key = SocketPeer::new(cookie(context), peer.addr, peer.port, SocketWay::ToFrontend);
    // SAFETY: an entry may be given to another socket after an eviction, not one looked up a moment ago.
    if let Some(frontend) = unsafe { F::sockets().get(&key) } {
        set_peer(context, Peer { addr: frontend.addr, port: frontend.port });
    }
}

#[inline(always)]
fn refuse<F: Family>(hook: Hook, reason: Outcome, peer: Peer<F::Addr>, protocol: Protocol) -> Answer {
    count(hook, reason);
    event::unserved::<F>(hook, reason, peer.addr, peer.port, protocol);
    let error = match reason {
        Outcome::RejectNoEndpoint | Outcome::RejectNoPort => ECONNREFUSED,
        Outcome::DropMartian => EADDRNOTAVAIL,
        _ => EHOSTUNREACH,
    };
    // SAFETY: takes a number.
    unsafe { helpers::bpf_set_retval(-error) };
    Answer::Refuse
}

#[inline(always)]
fn cookie(context: &impl EbpfContext) -> u64 {
    // SAFETY: a helper on the program's own context.
    unsafe { helpers::bpf_get_socket_cookie(context.as_ptr()) }
}

#[inline(always)]
fn netns(context: &SockAddrContext) -> [u32; 2] {
    // SAFETY: a helper on the program's own context.
    let cookie = unsafe { helpers::bpf_get_netns_cookie(context.as_ptr()) };
    [cookie as u32, (cookie >> 32) as u32]
}
