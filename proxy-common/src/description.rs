//! What the maps say of themselves, for versions that have other types: the one entry of `DESCRIPTION`. Written by the agent; no
//! program looks at it.

/// Bytes of room.
pub const ROOM: usize = 65_536;

/// UTF-8 with zeros behind it. Lines of words:
///
/// ```text
/// layout 7
/// readable-by 7
/// program pod_in
/// map FLOWS_V4
/// key saddr.octets 0 4
/// value backend 36 4
/// ```
///
/// First [`crate::node::LAYOUT`] and [`crate::node::READABLE_BY`], then every program that may be attached, then every map with the
/// fields of its keys and of its values: name, offset and size in bytes. A type without fields has one of the name `self`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Description {
    /// The bytes.
    pub octets: [u8; ROOM],
}

crate::no_padding!(Description: [u8; ROOM]);
crate::map_type!(Description);
