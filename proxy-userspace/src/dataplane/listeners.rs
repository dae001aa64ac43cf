//! Who listens on the node: its own processes' TCP and UDP ports, out of the kernel's tables of sockets.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use proxy_common::addr::Protocol;

/// The tables, their protocols, and the state of a socket that waits for whoever comes: LISTEN, or unconnected
/// (`include/net/tcp_states.h`).
const TABLES: [(&str, Protocol, &str); 4] = [
    ("/proc/net/tcp", Protocol::Tcp, "0A"),
    ("/proc/net/tcp6", Protocol::Tcp, "0A"),
    ("/proc/net/udp", Protocol::Udp, "07"),
    ("/proc/net/udp6", Protocol::Udp, "07"),
];

/// Every port that is listened on in the calling thread's network namespace. A family the kernel does not have is empty.
pub fn listeners() -> io::Result<BTreeSet<(Protocol, SocketAddr)>> {
    let mut found = BTreeSet::new();
    for (path, protocol, state) in TABLES {
        match fs::read_to_string(path) {
            Ok(table) => found.extend(table.lines().filter_map(|line| Some((protocol, listener(line, state)?)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The local address of a line, if its socket is in the state.
fn listener(line: &str, state: &str) -> Option<SocketAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, found) = (fields.next()?, fields.next()?, fields.next()?);
    let (address, port) = local.split_once(':')?;
    let address = parse_address(address)?;
    (found == state).then_some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

/// Words of four bytes, each as a number of this machine.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |index: usize| u32::from_str_radix(text.get(8 * index..8 * (index + 1))?, 16).ok().map(u32::to_ne_bytes);
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for (index, place) in octets.chunks_exact_mut(4).enumerate() {
                place.copy_from_slice(&word(index)?);
            }
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, UdpSocket};

    use proxy_common::addr::Protocol::{Tcp, Udp};

    use super::listeners;

    #[test]
    fn whoever_listens_is_found_and_whoever_talks_is_not() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let listening = TcpListener::bind(address).unwrap();
            let waiting = UdpSocket::bind(address).unwrap();
            let talking = UdpSocket::bind("127.0.0.1:0").unwrap();
            talking.connect("127.0.0.1:9").unwrap();
            let found = listeners().unwrap();
            assert!(found.contains(&(Tcp, listening.local_addr().unwrap())), "{address}: {found:?}");
            assert!(found.contains(&(Udp, waiting.local_addr().unwrap())), "{address}: {found:?}");
            let talking: SocketAddr = talking.local_addr().unwrap();
            assert!(!found.contains(&(Udp, talking)), "{talking}");
        }
    }
}
