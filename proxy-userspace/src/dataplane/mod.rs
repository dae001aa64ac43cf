//! The only module that talks to the kernel: loads and attaches the programs, reads and writes the maps.

pub mod netlink;
mod options;

pub use self::options::{ClassifierMode, DevicePattern, Options, PatternError, SocketLb, UplinkMode};
