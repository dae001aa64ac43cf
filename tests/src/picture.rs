//! What the Services in the kernel mean, read from an agent's pinned maps: which endpoints answer at which frontend. And
//! a witness who looks all the time, because what is wrong for a moment is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
};
use proxy_common::{
    addr::{Ipv4, Ipv6, Protocol},
    backend::{Backend, BackendId},
    service::{Frontend, Range, Service, WhenEmpty},
};

/// Who answers at a frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answers {
    /// `address:port` of those that clients of this node get.
    pub internal: BTreeSet<String>,
    /// `address:port` of those that clients beyond the uplinks get.
    pub external: BTreeSet<String>,
    /// What clients of this node meet when there is nobody: `reject` or `drop`.
    pub otherwise: &'static str,
}

/// Frontends as `address:port/PROTOCOL`; a NodePort has the unspecified address. The frontends that stand for all ports
/// of a ClusterIP are left out.
pub type Picture = BTreeMap<String, Answers>;

/// The maps of an agent, open.
pub struct Maps {
    slots: Array<MapData, BackendId>,
    v4: FamilyMaps<Ipv4>,
    v6: FamilyMaps<Ipv6>,
}

struct FamilyMaps<A>
where
    Backend<A>: Pod,
{
    services: HashMap<MapData, Frontend<A>, Service>,
    backends: Array<MapData, Backend<A>>,
}

impl Maps {
    /// Opens the maps below a pin path.
    pub fn open(pins: &Path) -> Result<Self> {
        Ok(Self {
            slots: Map::Array(open(pins, "SLOTS")?).try_into()?,
            v4: FamilyMaps::open(pins, "V4")?,
            v6: FamilyMaps::open(pins, "V6")?,
        })
    }

    /// What they mean now. A range that is read stays as it is for seconds, so that each frontend is read whole.
    pub fn picture(&self) -> Result<Picture> {
        let mut picture = Picture::new();
        self.v4.describe(&self.slots, |addr| IpAddr::from(addr.octets), &mut picture)?;
        self.v6.describe(&self.slots, |addr| IpAddr::from(addr.octets), &mut picture)?;
        Ok(picture)
    }
}

fn open(pins: &Path, map: &str) -> Result<MapData> {
    MapData::from_pin(pins.join("maps").join(map)).with_context(|| format!("cannot open the map {map}"))
}

impl<A: Copy> FamilyMaps<A>
where
    Frontend<A>: Pod,
    Backend<A>: Pod,
{
    fn open(pins: &Path, family: &str) -> Result<Self> {
        Ok(Self {
            services: Map::HashMap(open(pins, &format!("SERVICES_{family}"))?).try_into()?,
            backends: Map::Array(open(pins, &format!("BACKENDS_{family}"))?).try_into()?,
        })
    }

    fn describe(
        &self,
        slots: &Array<MapData, BackendId>,
        address: impl Fn(A) -> IpAddr,
        picture: &mut Picture,
    ) -> Result<()> {
        let targets = |range: Range| -> Result<BTreeSet<String>> {
            let slots = (range.first..range.first + range.count).map(|slot| slots.get(&slot, 0));
            let targets = slots.map(|id| {
                let backend = self.backends.get(&id?, 0)?;
                Ok(SocketAddr::new(address(backend.addr), backend.port.number()).to_string())
            });
            targets.collect()
        };
        for entry in &self.services {
            let (frontend, service) = entry?;
            let Some(protocol) = protocol_name(frontend.proto) else { continue };
            let name = SocketAddr::new(address(frontend.addr), frontend.port.number());
            let answers = Answers {
                internal: targets(service.internal)?,
                external: targets(service.external)?,
                otherwise: if service.internal_empty == WhenEmpty::Drop { "drop" } else { "reject" },
            };
            picture.insert(format!("{name}/{protocol}"), answers);
        }
        Ok(())
    }
}

fn protocol_name(protocol: Protocol) -> Option<&'static str> {
    match protocol {
        Protocol::Tcp => Some("TCP"),
        Protocol::Udp => Some("UDP"),
        Protocol::Sctp => Some("SCTP"),
        Protocol::Any => None,
    }
}

/// Somebody who looks at the maps again and again, and remembers all that was seen at each frontend.
#[derive(Debug)]
pub struct Witness {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Testimony>>>,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Testimony {
    /// How often it was looked.
    pub looks: usize,
    /// Per frontend what it was, each once; `None` when it was not there.
    pub seen: BTreeMap<String, BTreeSet<Option<Answers>>>,
}

impl Witness {
    /// Starts looking.
    pub fn of(pins: &Path) -> Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let (pins, over) = (PathBuf::from(pins), Arc::clone(&is_over));
        let thread = std::thread::Builder::new().name("witness".into()).spawn(move || watch(&pins, &over))?;
        Ok(Self { is_over, thread: Some(thread) })
    }

    /// Stops looking, after one last look.
    pub fn testify(mut self) -> Result<Testimony> {
        self.is_over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a witness testifies once")?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What a witness nobody asked has seen does not matter.
            let _ = thread.join();
        }
    }
}

fn watch(pins: &Path, is_over: &AtomicBool) -> Result<Testimony> {
    let maps = Maps::open(pins)?;
    let mut testimony = Testimony::default();
    loop {
        let is_last = is_over.load(Ordering::Relaxed);
        testimony.add(&maps.picture()?);
        if is_last {
            return Ok(testimony);
        }
        // The processor is needed by whoever is looked at.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

impl Testimony {
    fn add(&mut self, picture: &Picture) {
        for (frontend, answers) in picture {
            let is_new = !self.seen.contains_key(frontend);
            let seen = self.seen.entry(frontend.clone()).or_default();
            if is_new && self.looks > 0 {
                seen.insert(None);
            }
            seen.insert(Some(answers.clone()));
        }
        for (_, seen) in self.seen.iter_mut().filter(|(frontend, _)| !picture.contains_key(*frontend)) {
            seen.insert(None);
        }
        self.looks += 1;
    }

    /// Frontends that were not the same all the time, with all they were.
    pub fn changes(&self) -> BTreeMap<&str, &BTreeSet<Option<Answers>>> {
        let changed = self.seen.iter().filter(|(_, seen)| seen.len() > 1);
        changed.map(|(frontend, seen)| (frontend.as_str(), seen)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Answers, Picture, Testimony};

    fn picture(frontends: &[(&str, &str)]) -> Picture {
        let answers = |endpoint: &str| Answers {
            internal: [endpoint.to_owned()].into(),
            external: [endpoint.to_owned()].into(),
            otherwise: "reject",
        };
        frontends.iter().map(|(frontend, endpoint)| ((*frontend).to_owned(), answers(endpoint))).collect()
    }

    #[test]
    fn a_witness_remembers_what_came_what_went_and_what_changed() {
        let mut testimony = Testimony::default();
        testimony.add(&picture(&[("stays", "a"), ("changes", "a"), ("goes", "a")]));
        testimony.add(&picture(&[("stays", "a"), ("changes", "b"), ("comes", "a")]));
        let changes = testimony.changes();
        assert!(changes.keys().eq(["changes", "comes", "goes"].iter()), "{changes:?}");
        assert!(!changes["changes"].contains(&None));
        assert!(changes["goes"].contains(&None) && changes["comes"].contains(&None));
    }
}
