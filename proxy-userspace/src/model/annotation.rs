//! What a Service's annotations say of how its connections are spread.
//!
//! `service.sluice.dev/algorithm` names an algorithm. `service.sluice.dev/weights` gives endpoints other weights than 1, in
//! entries `WHO=WEIGHT` with commas between them, of which the first that fits an endpoint counts:
//!
//! | `WHO` | whom it fits |
//! |---|---|
//! | `10.0.0.1`, `fd00::1` | the endpoint with this address |
//! | `10.0.1.0/24` | endpoints within this network |
//! | `web-0` | the pod of this name, or what else the endpoint stands for |
//! | `web-canary-*` | pods whose names begin so; `*` alone fits everybody |
//!
//! With `web-canary-*=1,*=9` a canary gets a ninth of what any other endpoint gets. Weight 0 means no new connections, as if
//! the endpoint were not ready; it keeps those it has.

use std::{collections::BTreeMap, net::IpAddr, str::FromStr};

use ipnet::IpNet;

use super::{Endpoint, defect::Problem};
use crate::{algorithm::AlgorithmName, node_port_mode::NodePortMode};

const ALGORITHM: &str = "service.sluice.dev/algorithm";
const WEIGHTS: &str = "service.sluice.dev/weights";

/// `snat`, `dsr` or `hybrid`: how packets from outside get to a backend on another node.
const NODE_PORT_MODE: &str = "service.sluice.dev/nodeport-mode";

/// `true`: clients of the family that the Service has no address of get to its backends, too.
const CROSSES: &str = "service.sluice.dev/nat46x64";

/// Beyond this a weight is a mistake.
const HEAVIEST: u32 = 1000;

/// How a Service's connections are spread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// By this algorithm; none means the node's default.
    pub algorithm: Option<AlgorithmName>,
    /// Of its endpoints.
    pub weights: Weights,
}

/// Weights of endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Weights(Box<[Weight]>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Weight {
    who: Who,
    weight: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    Address(IpAddr),
    Within(IpNet),
    Named(Box<str>),
    NamedLike(Box<str>),
}

impl Spread {
    /// Reads the annotations. What means nothing is left out and told.
    pub(super) fn parse(annotations: Option<&BTreeMap<String, String>>, note: &mut impl FnMut(Problem)) -> Self {
        let text = |name: &str| annotations.and_then(|annotations| annotations.get(name)).map(|text| text.trim());
        let algorithm = text(ALGORITHM).and_then(|text| {
            let parsed = text.parse();
            parsed.map_err(|_error| note(Problem::annotation(ALGORITHM, text))).ok()
        });
        let entries = text(WEIGHTS).into_iter().flat_map(|text| text.split(','));
        let entries = entries.map(str::trim).filter(|entry| !entry.is_empty());
        let mut parse = |entry: &str| {
            let parsed: Option<Weight> = entry.parse().ok();
            if parsed.is_none() {
                note(Problem::annotation(WEIGHTS, entry));
            }
            parsed
        };
        Self { algorithm, weights: Weights(entries.filter_map(&mut parse).collect()) }
    }
}

/// Reads how packets from outside get to a backend on another node, if the Service says it.
pub(super) fn node_port_mode(
    annotations: Option<&BTreeMap<String, String>>,
    note: &mut impl FnMut(Problem),
) -> Option<NodePortMode> {
    let text = annotations?.get(NODE_PORT_MODE)?.trim();
    text.parse().map_err(|_error| note(Problem::annotation(NODE_PORT_MODE, text))).ok()
}

/// Reads whether clients of the other family are served.
pub(super) fn crosses(annotations: Option<&BTreeMap<String, String>>, note: &mut impl FnMut(Problem)) -> bool {
    let Some(text) = annotations.and_then(|annotations| annotations.get(CROSSES)).map(|text| text.trim()) else {
        return false;
    };
    text.parse().map_err(|_error| note(Problem::annotation(CROSSES, text))).unwrap_or_default()
}

/// Not an entry of the annotation.
struct Unreadable;

impl FromStr for Weight {
    type Err = Unreadable;

    fn from_str(entry: &str) -> Result<Self, Unreadable> {
        let (who, weight) = entry.split_once('=').ok_or(Unreadable)?;
        let weight = weight.trim().parse().ok().filter(|weight| *weight <= HEAVIEST).ok_or(Unreadable)?;
        Ok(Self { who: who.trim().parse()?, weight })
    }
}

impl FromStr for Who {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || ['-', '.'].contains(&c));
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if let Ok(net) = text.parse() {
            return Ok(Self::Within(net));
        }
        match text.strip_suffix('*') {
            Some(beginning) if is_name(beginning) => Ok(Self::NamedLike(beginning.into())),
            None if !text.is_empty() && is_name(text) => Ok(Self::Named(text.into())),
            _ => Err(Unreadable),
        }
    }
}

impl Who {
    fn fits(&self, endpoint: &Endpoint) -> bool {
        let name = endpoint.name.as_deref();
        match self {
            Self::Address(address) => endpoint.address == *address,
            Self::Within(net) => net.contains(&endpoint.address),
            Self::Named(wanted) => name == Some(wanted),
            Self::NamedLike(beginning) => name.unwrap_or_default().starts_with(&**beginning),
        }
    }
}

impl Weights {
    /// The weight of an endpoint.
    pub fn of(&self, endpoint: &Endpoint) -> u32 {
        self.0.iter().find(|entry| entry.who.fits(endpoint)).map_or(1, |entry| entry.weight)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{ALGORITHM, Spread, WEIGHTS};
    use crate::{
        algorithm::AlgorithmName,
        model::{Endpoint, NodeNumber},
    };

    fn parse(annotations: &[(&str, &str)]) -> (Spread, Vec<String>) {
        let annotations = annotations.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        let mut problems = Vec::new();
        let spread = Spread::parse(Some(&annotations), &mut |problem| problems.push(problem.to_string()));
        (spread, problems)
    }

    fn endpoint(address: &str, name: &str) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            name: (!name.is_empty()).then(|| name.into()),
            is_ready: true,
            is_serving: true,
            is_terminating: false,
            is_local: false,
            node: NodeNumber::default(),
            hints: Arc::default(),
        }
    }

    #[test]
    fn the_first_entry_that_fits_an_endpoint_is_its_weight() {
        let cases = [
            ("nothing", "", 1),
            ("its address", "10.0.0.2=7, 10.0.0.1 = 3", 3),
            ("its network", "10.0.0.0/24=4", 4),
            ("another family", "fd00::/8=4", 1),
            ("its name", "web=2,web-0=5", 5),
            ("how its name begins", "web-1*=2,web-*=0", 0),
            ("everybody", "*=9", 9),
            ("the first", "*=9,10.0.0.1=3", 9),
        ];
        for (name, text, expected) in cases {
            let (spread, problems) = parse(&[(WEIGHTS, text)]);
            assert_eq!(spread.weights.of(&endpoint("10.0.0.1", "web-0")), expected, "{name}");
            assert!(problems.is_empty(), "{name}: {problems:?}");
        }
        let (spread, _) = parse(&[(WEIGHTS, "web-*=3,*=2")]);
        assert_eq!(spread.weights.of(&endpoint("10.0.0.1", "")), 2, "nameless");
    }

    #[test]
    fn what_means_nothing_is_told_and_the_rest_counts() {
        let text = "10.0.0.1,=1,web-0=x,web-0=-1,a*b=1,10.0.0.0/33=1,web_0=1,web-0=1001,web-0=1000";
        let (spread, problems) = parse(&[(ALGORITHM, "Maglev"), (WEIGHTS, text)]);
        assert_eq!(spread.algorithm, None);
        assert_eq!(spread.weights.of(&endpoint("10.0.0.1", "web-0")), 1000);
        assert_eq!(problems.len(), 9, "{problems:#?}");
        assert!(
            problems[0].contains("service.sluice.dev/algorithm") && problems[0].contains("Maglev"),
            "{problems:#?}"
        );
        assert!(problems[1..].iter().all(|problem| problem.contains("service.sluice.dev/weights")), "{problems:#?}");
    }

    #[test]
    fn an_algorithm_is_named() {
        assert_eq!(parse(&[(ALGORITHM, " maglev ")]).0.algorithm, Some(AlgorithmName::Maglev));
        assert_eq!(parse(&[]), (Spread::default(), vec![]));
    }
}
