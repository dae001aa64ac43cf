//! What is measured.

use std::fmt;

use proxy_common::addr::Protocol;

use super::yardstick::Place;
use crate::frame::Family;

/// What the packets of a case are to the balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Pass,
    /// Of connections it knows, from the client.
    Established,
    /// From the backend.
    Reply,
    /// Of connections it has never seen, each of another one; no table has room left.
    New,
}

/// Numbers of Services, of which none should matter.
pub const SERVICES: [u32; 3] = [10, 1_000, 50_000];

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Where.
    pub place: Place,
    /// Family of addresses.
    pub family: Family,
    /// Protocol.
    pub proto: Protocol,
    /// What the packets are.
    pub kind: Kind,
    /// Of how many flows.
    pub flows: u32,
    /// The agent's programs know at least so many Services.
    pub services: u32,
}

impl Case {
    /// TCP over IPv4 in the driver.
    pub const fn new(kind: Kind, flows: u32) -> Self {
        Self { place: Place::Xdp, family: Family::V4, proto: Protocol::Tcp, kind, flows, services: 0 }
    }

    /// The same at another place.
    #[must_use]
    pub const fn at(self, place: Place) -> Self {
        Self { place, ..self }
    }

    /// The same in another family.
    #[must_use]
    pub const fn over(self, family: Family) -> Self {
        Self { family, ..self }
    }

    /// The same in UDP.
    #[must_use]
    pub const fn udp(self) -> Self {
        Self { proto: Protocol::Udp, ..self }
    }

    /// The same beside so many Services.
    #[must_use]
    pub const fn among(self, services: u32) -> Self {
        Self { services, ..self }
    }

    /// Those of a bench.
    pub fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for place in Place::BOTH {
            for family in Family::BOTH {
                let of = |kind, flows| Self::new(kind, flows).at(place).over(family);
                cases.push(of(Kind::Pass, 1));
                cases.extend([1, 1_000, 64_000].map(|flows| of(Kind::Established, flows)));
                cases.extend([1, 1_000].map(|flows| of(Kind::Reply, flows)));
                cases.extend([1, 1_000].map(|flows| of(Kind::Established, flows).udp()));
                cases.push(of(Kind::New, 1));
            }
        }
        cases.extend(SERVICES.map(|services| Self::new(Kind::Established, 1_000).among(services)));
        cases
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.place == Place::Xdp { "XDP" } else { "TC" };
        let family = if self.family == Family::V4 { "IPv4" } else { "IPv6" };
        write!(f, "{place} {family} ")?;
        match self.kind {
            Kind::Pass => write!(f, "not a Service"),
            Kind::Established => write!(f, "{} known, {}", self.proto, flows(self.flows)),
            Kind::Reply => write!(f, "{} reply, {}", self.proto, flows(self.flows)),
            Kind::New => write!(f, "{} new, tables full", self.proto),
        }?;
        if self.services == 0 { Ok(()) } else { write!(f, ", {} Services", self.services) }
    }
}

fn flows(count: u32) -> String {
    match count {
        1 => "1 flow".to_owned(),
        1_000.. => format!("{}k flows", count / 1_000),
        _ => format!("{count} flows"),
    }
}
