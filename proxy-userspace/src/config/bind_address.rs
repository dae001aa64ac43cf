//! Where something is served, as the operator writes it: an address with or without a port, or nothing to serve nowhere.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// Where something is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindAddress {
    /// Nowhere.
    Nowhere,
    /// There, on the usual port.
    Address(IpAddr),
    /// There.
    Socket(SocketAddr),
}

/// Why text is not a [`BindAddress`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address like 0.0.0.0:10256 or [::]:10256 nor empty, which turns it off")]
pub struct BindAddressError(String);

impl BindAddress {
    /// All addresses, of both families or of IPv4.
    pub fn everywhere(is_ipv6: bool) -> Self {
        Self::Address(if is_ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() })
    }

    /// The loopback address of a family.
    pub fn loopback(is_ipv6: bool) -> Self {
        Self::Address(if is_ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() })
    }

    /// Where to listen, if anywhere.
    pub fn resolve(self, usual_port: u16) -> Option<SocketAddr> {
        match self {
            Self::Nowhere => None,
            Self::Address(address) => Some(SocketAddr::new(address, usual_port)),
            Self::Socket(socket) => Some(socket),
        }
    }
}

impl FromStr for BindAddress {
    type Err = BindAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Ok(Self::Nowhere);
        }
        let socket = text.parse().map(Self::Socket);
        socket.or_else(|_| text.parse().map(Self::Address)).map_err(|_error| BindAddressError(text.into()))
    }
}

impl fmt::Display for BindAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => Ok(()),
            Self::Address(address) => address.fmt(f),
            Self::Socket(socket) => socket.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::BindAddress;

    #[test]
    fn the_port_may_be_left_out_and_nothing_turns_it_off() {
        let cases = [
            ("0.0.0.0:1", Some("0.0.0.0:1")),
            ("127.0.0.1", Some("127.0.0.1:10249")),
            ("::", Some("[::]:10249")),
            ("[::1]:2", Some("[::1]:2")),
            ("", None),
        ];
        for (text, expected) in cases {
            let socket = text.parse::<BindAddress>().unwrap().resolve(10249);
            assert_eq!(socket, expected.map(|socket| socket.parse().unwrap()), "{text}");
        }
        for nonsense in ["localhost", ":10249", "1.2.3.4:70000", "[::1]"] {
            assert!(nonsense.parse::<BindAddress>().is_err(), "{nonsense}");
        }
    }
}
