//! Which Service port has which index. A port keeps its index for as long as one of its frontends is in the kernel, also
//! when the agent is started anew in between.

use std::{collections::HashMap, sync::Arc, time::Instant};

use proxy_common::service::Service;

use super::{ids::Ids, ledger::Overflow};
use crate::model::ServicePortName;

/// Which Service port has which index.
#[derive(Debug)]
pub(super) struct Indexes {
    by_port: HashMap<Arc<ServicePortName>, u32>,
    ports: HashMap<u32, Arc<ServicePortName>>,
    /// Frontends in the kernel that bear the index.
    uses: HashMap<u32, usize>,
    ids: Ids,
}

impl Indexes {
    pub(super) fn adopt<'a>(services: impl Iterator<Item = &'a Service>, capacity: u32) -> Self {
        let mut indexes =
            Self { by_port: HashMap::new(), ports: HashMap::new(), uses: HashMap::new(), ids: Ids::new(capacity) };
        for service in services {
            indexes.ids.claim(service.index);
            indexes.hold(service.index);
        }
        indexes
    }

    pub(super) fn claim(&mut self, index: u32, port: &Arc<ServicePortName>) {
        if index != 0 && !self.by_port.contains_key(port) && !self.ports.contains_key(&index) {
            self.assign(index, port);
        }
    }

    fn assign(&mut self, index: u32, port: &Arc<ServicePortName>) {
        self.by_port.insert(Arc::clone(port), index);
        self.ports.insert(index, Arc::clone(port));
    }

    pub(super) fn of(&mut self, port: &Arc<ServicePortName>, now: Instant) -> Result<u32, Overflow> {
        if let Some(index) = self.by_port.get(port) {
            return Ok(*index);
        }
        let index = self.ids.take(now).ok_or_else(|| Overflow::Service(port.as_ref().clone()))?;
        self.assign(index, port);
        Ok(index)
    }

    pub(super) fn hold(&mut self, index: u32) {
        *self.uses.entry(index).or_default() += 1;
    }

    /// Says whether that was the last frontend.
    pub(super) fn release(&mut self, index: u32, now: Instant) -> bool {
        let Some(uses) = self.uses.get_mut(&index) else { return false };
        *uses -= 1;
        if *uses > 0 {
            return false;
        }
        self.uses.remove(&index);
        self.ids.put_back(index, now);
        if let Some(port) = self.ports.remove(&index) {
            self.by_port.remove(&port);
        }
        true
    }
}
