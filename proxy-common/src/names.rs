//! What people call things. Written by the agent for whoever reads the maps; no program looks at it.

/// UTF-8 with zeros behind it. What is longer is cut, at the end of a character.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text {
    /// The bytes. The last one is always zero.
    pub octets: [u8; 64],
}

/// Which port of which Service an index is for: value of `NAMES_V4` and `NAMES_V6`, by [`crate::service::Service::index`]. An
/// index that no Service has any more keeps its name until another gets it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// Of the Service.
    pub namespace: Text,
    /// Of the Service.
    pub name: Text,
    /// Empty for the only port of a Service.
    pub port: Text,
}

/// The agent's word on itself: the one entry of `AGENT`. All zeros before the first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Agent {
    /// When it started, in seconds of `CLOCK_BOOTTIME`, as all times here.
    pub started: u64,
    /// When it was last seen at work. Renewed every ten seconds.
    pub alive: u64,
    /// When its source of objects last had news; 0 before the first.
    pub heard: u64,
    /// When the kernel last held everything that was known; 0 before the first time.
    pub synced: u64,
    /// Its process, in its own namespace of processes.
    pub pid: u32,
    /// How often in a row the kernel could not be made to hold what it should.
    pub failures: u32,
    /// What it has given up: bits of [`confined`].
    pub confined: u32,
    /// Zero.
    pub pad: u32,
    /// Its version.
    pub version: Text,
    /// The algorithm of Services that ask for none.
    pub algorithm: Text,
}

/// Bits of [`Agent::confined`].
pub mod confined {
    /// It has only capabilities that it needs.
    pub const CAPABILITIES: u32 = 1;
    /// Nothing it executes gains any.
    pub const NO_NEW_PRIVILEGES: u32 = 2;
    /// System calls that it has no use for fail.
    pub const SYSTEM_CALLS: u32 = 4;
    /// It writes to its pins and to settings of the network, and to no other file.
    pub const FILES: u32 = 8;
}

impl Text {
    /// Nothing.
    pub const EMPTY: Self = Self { octets: [0; 64] };

    /// As much of it as there is room for.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut octets = [0; 64];
        let end = text.floor_char_boundary(octets.len() - 1);
        octets.iter_mut().zip(text.as_bytes().iter().take(end)).for_each(|(place, octet)| *place = *octet);
        Self { octets }
    }

    /// What it says; nothing, if that is not UTF-8.
    pub fn as_str(&self) -> &str {
        let end = self.octets.iter().position(|octet| *octet == 0).unwrap_or(self.octets.len());
        self.octets.get(..end).and_then(|octets| core::str::from_utf8(octets).ok()).unwrap_or_default()
    }
}

impl Agent {
    /// What stands there before anybody has written.
    pub const NONE: Self = Self {
        started: 0,
        alive: 0,
        heard: 0,
        synced: 0,
        pid: 0,
        failures: 0,
        confined: 0,
        pad: 0,
        version: Text::EMPTY,
        algorithm: Text::EMPTY,
    };
}

crate::no_padding!(Text: [u8; 64]);
crate::no_padding!(ServiceName: Text, Text, Text);
crate::no_padding!(Agent: u64, u64, u64, u64, u32, u32, u32, u32, Text, Text);
crate::map_type!(Text, ServiceName, Agent);

#[cfg(test)]
mod tests {
    use super::Text;

    #[test]
    fn text_comes_back_as_it_was() {
        for text in ["", "default", "späti"] {
            assert_eq!(Text::new(text).as_str(), text);
        }
    }

    #[test]
    fn text_that_is_too_long_is_cut_between_two_characters() {
        assert_eq!(Text::new(&"a".repeat(200)).as_str(), "a".repeat(63));
        assert_eq!(Text::new(&"ä".repeat(200)).as_str(), "ä".repeat(31));
    }

    #[test]
    fn bytes_that_are_no_text_say_nothing() {
        assert_eq!(Text { octets: [0xff; 64] }.as_str(), "");
    }
}
