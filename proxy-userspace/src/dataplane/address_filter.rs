//! The two address filters as the agent keeps them: its own copy, and the map that the programs read. While the agent
//! runs, bits are only added, and always before the entry that needs them is written.

use proxy_common::filter::{Filter, Hashed};

use super::{error::Error, table::Table};

/// `INBOUND` or `OUTBOUND`.
pub(super) struct AddressFilter {
    map: Table<u32, Filter>,
    copy: Box<Filter>,
    is_dirty: bool,
}

impl AddressFilter {
    /// The filter as it stands in the kernel.
    pub(super) fn adopt(map: Table<u32, Filter>) -> Result<Self, Error> {
        let copy = Box::new(map.read(&0)?);
        Ok(Self { map, copy, is_dirty: false })
    }

    /// Adds an address, in the copy only.
    pub(super) fn add(&mut self, address: &impl Hashed) {
        if !self.copy.may_have(address.bit()) {
            self.copy.add(address);
            self.is_dirty = true;
        }
    }

    /// Makes the kernel's filter equal to the copy. The kernel writes word by word, so a packet that comes meanwhile
    /// sees some of the new bits and all of the old ones.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        if self.is_dirty {
            self.map.put(&0, &self.copy)?;
            self.is_dirty = false;
        }
        Ok(())
    }

    /// Puts another filter in the place of the copy.
    pub(super) fn replace(&mut self, filter: Box<Filter>) {
        self.is_dirty |= self.copy.words != filter.words;
        self.copy = filter;
    }
}
