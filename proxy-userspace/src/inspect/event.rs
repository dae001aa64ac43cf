//! Things that happen, in people's words. In: the programs' records, and what the maps say of Services and backends. Out: plain
//! data, of which a filter lets through what is asked for.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use ipnet::IpNet;
use jiff::Timestamp;
use proxy_common::{
    addr::Protocol,
    event,
    outcome::{Hook, Outcome},
};
use serde::Serialize;

use super::{
    PortName, Roster,
    meaning::{hook_name, meaning, outcome_name},
};
use crate::dataplane;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// When.
    pub time: Timestamp,
    /// Where, as in metrics.
    pub hook: String,
    /// What: the outcome's name.
    pub event: String,
    /// What that means.
    pub meaning: &'static str,
    /// `TCP`, `UDP`, `SCTP`, or a number; none for what is no IP.
    pub protocol: Option<String>,
    /// Who sent the packet; none for a socket. Without a port where it was not understood.
    pub source: Option<End>,
    /// Whom it was for, before any rewrite; what a socket named.
    pub destination: Option<End>,
    /// Whom it went to.
    pub backend: Option<SocketAddr>,
    /// The Service port.
    pub service: Option<PortName>,
    /// The device it was seen at.
    pub device: Option<String>,
}

/// One end of a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Address.
    pub address: IpAddr,
    /// Port; 0 where there is none.
    pub port: u16,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            0 => self.address.fmt(f),
            port => SocketAddr::new(self.address, port).fmt(f),
        }
    }
}

impl Serialize for End {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Event {
    /// A record in words; none for one of a version that knows other hooks or outcomes.
    pub fn new(record: &event::Event, roster: &Roster, booted: Timestamp) -> Option<Self> {
        let hook = Hook::ALL.into_iter().find(|hook| *hook as u32 == u32::from(record.hook))?;
        let outcome = Outcome::ALL.into_iter().find(|outcome| *outcome as u32 == u32::from(record.outcome))?;
        let is_socket = matches!(hook, Hook::Connect | Hook::Sendmsg | Hook::PostBind);
        let has_addresses = record.family != 0;
        let end = |address, port: proxy_common::addr::Port| End { address, port: port.number() };
        let (source, destination) = (address(record, record.saddr), address(record, record.daddr));
        Some(Self {
            time: booted + std::time::Duration::from_nanos(record.at),
            hook: hook_name(hook),
            event: outcome_name(outcome),
            meaning: meaning(outcome),
            protocol: has_addresses.then(|| protocol_name(record.proto)),
            source: (has_addresses && !is_socket).then(|| end(source, record.sport)),
            destination: has_addresses.then(|| end(destination, record.dport)),
            backend: roster.backend(record),
            service: roster.service(record),
            device: dataplane::device_name(record.ifindex),
        })
    }
}

/// An address of a record as it was on the wire. In the tables for both families IPv4's are mapped, too.
fn address(record: &event::Event, address: proxy_common::addr::Ipv6) -> IpAddr {
    let address = Ipv6Addr::from(address.octets);
    let is_cross = [Hook::CrossUplinkIn, Hook::CrossPodIn].map(|hook| hook as u32).contains(&record.hook.into());
    if record.family == 4 || is_cross { IpAddr::V6(address).to_canonical() } else { address.into() }
}

fn protocol_name(number: u8) -> String {
    match number {
        1 => "ICMP".to_owned(),
        58 => "ICMPv6".to_owned(),
        number => [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .iter()
            .find(|protocol| **protocol as u8 == number)
            .map_or_else(|| number.to_string(), ToString::to_string),
    }
}

/// Which events are meant. What is not said fits all.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    /// Namespace and name, or the name alone.
    pub service: Option<String>,
    /// Of one end, or the backend.
    pub address: Option<IpNet>,
    /// The same.
    pub port: Option<u16>,
    /// By its name.
    pub protocol: Option<Protocol>,
    /// Any of these.
    pub events: Vec<Kind>,
    /// Any of these, by name.
    pub hooks: Vec<HookName>,
}

impl EventFilter {
    /// Whether an event is meant.
    pub fn fits(&self, event: &Event) -> bool {
        let Self { service, address, port, protocol, events, hooks } = self;
        let backend = event.backend.map(|backend| End { address: backend.ip(), port: backend.port() });
        let ends = [event.source, event.destination, backend];
        let any = |meant: &dyn Fn(&End) -> bool| ends.iter().flatten().any(meant);
        service.as_ref().is_none_or(|name| event.service.as_ref().is_some_and(|service| service.is_called(name)))
            && address.is_none_or(|net| any(&|end| net.contains(&end.address)))
            && port.is_none_or(|port| any(&|end| end.port == port))
            && protocol.is_none_or(|protocol| event.protocol.as_ref() == Some(&protocol.to_string()))
            && (events.is_empty() || events.iter().any(|kind| kind.fits(&event.event)))
            && (hooks.is_empty() || hooks.iter().any(|hook| hook.0 == event.hook))
    }
}

/// An outcome by its name, or all whose names begin with one word: `drop`, `reject`, `pass`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind(String);

impl Kind {
    fn fits(&self, name: &str) -> bool {
        name.strip_prefix(self.0.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = Self(text.to_owned());
        let names: Vec<String> = Outcome::ALL.into_iter().map(outcome_name).collect();
        if names.iter().any(|name| kind.fits(name)) { Ok(kind) } else { Err(format!("one of {}", names.join(", "))) }
    }
}

/// A hook, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookName(String);

impl FromStr for HookName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Hook::ALL.map(hook_name);
        if names.iter().any(|name| name == text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("one of {}", names.join(", ")))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use jiff::Timestamp;

    use super::{End, Event, EventFilter, Kind};
    use crate::inspect::PortName;

    /// A connection of a pod to `default/web:http`, opened.
    pub(crate) fn opened() -> Event {
        Event {
            time: Timestamp::UNIX_EPOCH,
            hook: "pod_in".to_owned(),
            event: "opened".to_owned(),
            meaning: "a new connection was given a backend",
            protocol: Some("TCP".to_owned()),
            source: Some(End { address: "10.244.1.7".parse().unwrap(), port: 4_000 }),
            destination: Some(End { address: "10.96.0.10".parse().unwrap(), port: 80 }),
            backend: Some("10.244.2.5:8080".parse().unwrap()),
            service: Some(PortName { namespace: "default".into(), name: "web".into(), port: "http".into() }),
            device: Some("veth7".to_owned()),
        }
    }

    #[test]
    fn a_filter_lets_through_what_fits_all_that_is_said() {
        let none = EventFilter::default;
        let cases = [
            ("nothing said", none(), true),
            ("the Service", EventFilter { service: Some("default/web".into()), ..none() }, true),
            ("another", EventFilter { service: Some("web2".into()), ..none() }, false),
            ("the client's network", EventFilter { address: Some("10.244.1.0/24".parse().unwrap()), ..none() }, true),
            ("the backend", EventFilter { address: Some("10.244.2.5/32".parse().unwrap()), ..none() }, true),
            ("nobody's network", EventFilter { address: Some("10.9.0.0/16".parse().unwrap()), ..none() }, false),
            ("the Service's port", EventFilter { port: Some(80), ..none() }, true),
            ("the backend's port", EventFilter { port: Some(8_080), ..none() }, true),
            ("another port", EventFilter { port: Some(8_081), ..none() }, false),
            ("its protocol", EventFilter { protocol: Some(proxy_common::addr::Protocol::Tcp), ..none() }, true),
            ("another protocol", EventFilter { protocol: Some(proxy_common::addr::Protocol::Udp), ..none() }, false),
            ("one of its kinds", EventFilter { events: kinds("drop,opened"), ..none() }, true),
            ("other kinds", EventFilter { events: kinds("drop,reject"), ..none() }, false),
            ("its hook", EventFilter { hooks: vec!["pod_in".parse().unwrap()], ..none() }, true),
            ("another hook", EventFilter { hooks: vec!["connect".parse().unwrap()], ..none() }, false),
            ("one thing of two", EventFilter { port: Some(80), events: kinds("drop"), ..none() }, false),
        ];
        for (name, filter, expected) in cases {
            assert_eq!(filter.fits(&opened()), expected, "{name}");
        }
    }

    fn kinds(words: &str) -> Vec<Kind> {
        words.split(',').map(|word| word.parse().unwrap()).collect()
    }

    #[test]
    fn what_has_no_service_is_of_none() {
        let event = Event { service: None, ..opened() };
        assert!(!EventFilter { service: Some("web".into()), ..EventFilter::default() }.fits(&event));
    }

    #[test]
    fn a_kind_is_an_outcome_or_the_first_word_of_some() {
        let cases =
            [("drop", "drop_source", true), ("drop_source", "drop_source", true), ("reset", "reset_gone", true)];
        for (kind, name, expected) in cases {
            assert_eq!(kind.parse::<Kind>().unwrap().fits(name), expected, "{kind} {name}");
        }
        assert!(!"drop_no_port".parse::<Kind>().unwrap().fits("drop_no_backend"));
        for wrong in ["", "dro", "dropped", "Drop"] {
            assert!(wrong.parse::<Kind>().unwrap_err().contains("drop_source"), "{wrong:?}");
        }
    }

    #[test]
    fn json_has_names_and_addresses_as_people_write_them() {
        let expected = serde_json::json!({
            "time": "1970-01-01T00:00:00Z", "hook": "pod_in", "event": "opened",
            "meaning": "a new connection was given a backend", "protocol": "TCP",
            "source": "10.244.1.7:4000", "destination": "10.96.0.10:80", "backend": "10.244.2.5:8080",
            "service": {"namespace": "default", "name": "web", "port": "http"}, "device": "veth7",
        });
        assert_eq!(serde_json::to_value(opened()).unwrap(), expected);
    }
}
