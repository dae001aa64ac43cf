//! The kernel's virtual services and their connections, as `/proc/net/ip_vs` and `/proc/net/ip_vs_conn` have them: in hexadecimal digits.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

/// One that has an address. Those of firewall marks are never kube-proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::kube_proxy) struct VirtualService {
    /// `TCP`, `UDP` or `SCTP`.
    pub(super) protocol: &'static str,
    /// Whom it is served to.
    pub(super) address: SocketAddr,
}

impl VirtualService {
    /// How ipvsadm is told the protocol.
    pub(super) fn option(&self) -> &'static str {
        match self.protocol {
            "UDP" => "--udp-service",
            "SCTP" => "--sctp-service",
            _ => "--tcp-service",
        }
    }
}

impl fmt::Display for VirtualService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, self.address)
    }
}

/// All of them.
pub(super) fn parse(text: &str) -> Vec<VirtualService> {
    text.lines().filter_map(service).collect()
}

fn service(line: &str) -> Option<VirtualService> {
    let mut fields = line.split_ascii_whitespace();
    let protocol = fields.next()?;
    let protocol = ["TCP", "UDP", "SCTP"].into_iter().find(|known| *known == protocol)?;
    let (ip, port) = fields.next()?.rsplit_once(':')?;
    Some(VirtualService { protocol, address: socket_address(ip, port)? })
}

/// How many connections there are to any of these. An entry that only remembers which backend a client has (its own port is 0) is none.
pub(super) fn connections(text: &str, at: &BTreeSet<SocketAddr>) -> usize {
    let destination = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(2);
        let client_port = fields.next()?;
        let (ip, port) = (fields.next()?, fields.next()?);
        (client_port != "0000").then(|| socket_address(ip, port))?
    };
    text.lines().filter_map(destination).filter(|address| at.contains(address)).count()
}

/// `0A600001` or `[2001:0db8:…]` (without brackets among the connections), `01BB`.
fn socket_address(ip: &str, port: &str) -> Option<SocketAddr> {
    let digits = ip.trim_start_matches('[').trim_end_matches(']');
    let ip = if digits.contains(':') {
        IpAddr::V6(digits.parse().ok()?)
    } else {
        IpAddr::V4(Ipv4Addr::from_bits(u32::from_str_radix(digits, 16).ok()?))
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::{connections, parse};

    const SERVICES: &str = "IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr 
  -> C0000209:192B      Masq    1      0          0         
UDP  [2001:0db8:0096:0000:0000:0000:0000:000a]:0035 rr 
FWM  00000001 wlc 
";

    #[test]
    fn services_are_read_as_the_kernel_writes_them() {
        let found: Vec<String> = parse(SERVICES).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["TCP 10.96.0.1:443", "UDP [2001:db8:96::a]:53"]);
    }

    #[test]
    fn connections_of_other_services_and_templates_are_not_counted() {
        let text = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C0000205 A3F2 0A600001 01BB C0000209 192B ESTABLISHED     899
TCP C0000205 0000 0A600001 01BB C0000209 192B NONE            899
TCP C0000205 A3F4 C6336401 0050 C0000209 192B ESTABLISHED     899
UDP 2001:0db8:0000:0000:0000:0000:0000:0005 A3F2 2001:0db8:0096:0000:0000:0000:0000:000a 0035 2001:0db8:0000:0000:0000:0000:0000:0009 0035 UDP 299
";
        let own = parse(SERVICES).into_iter().map(|service| service.address).collect();
        assert_eq!(connections(text, &own), 2);
    }
}
