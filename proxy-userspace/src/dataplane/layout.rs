//! How entries of the maps are laid out: what this version's are made of, and what pinned ones say of themselves in `DESCRIPTION`.
//! Where the two differ, [`Conversion`] takes entries from one to the other by the names of their fields.

mod btf;
mod convert;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use proxy_common::{
    description::ROOM,
    node::{LAYOUT, READABLE_BY},
};

pub(super) use self::convert::Conversion;
use super::{OBJECT, error::OpenError, program::ProgramName, raw::RawMap};

/// A value in an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// Its name, behind those of the structures it is in.
    pub(super) name: String,
    /// Bytes before it.
    pub(super) offset: usize,
    /// Bytes of it.
    pub(super) size: usize,
}

/// What a key or a value is made of, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields(pub(super) Vec<Field>);

impl Fields {
    /// The field of a name.
    pub(super) fn get(&self, name: &str) -> Option<&Field> {
        self.0.iter().find(|field| field.name == name)
    }

    /// Bytes of all.
    pub(super) fn size(&self) -> usize {
        self.0.iter().map(|field| field.offset + field.size).max().unwrap_or(0)
    }
}

/// What a map's entries are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MapFields {
    /// Their keys.
    pub(super) key: Fields,
    /// Their values.
    pub(super) value: Fields,
}

/// What all maps of a version are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Its number.
    pub(super) number: u32,
    /// The oldest layout whose readers understand it.
    pub(super) readable_by: u32,
    /// The programs that may be attached.
    pub(super) programs: BTreeSet<String>,
    /// The maps by name.
    pub(super) maps: BTreeMap<String, MapFields>,
}

/// Why text describes no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TextError {
    #[error("line {line} of its description is not understood: `{text}`")]
    Line { line: usize, text: String },
    #[error("its description does not say `{0}`")]
    Missing(&'static str),
}

impl Layout {
    /// This version's.
    pub(super) fn own() -> Result<Self, OpenError> {
        let object = aya_obj::Object::parse(OBJECT).map_err(aya::EbpfError::from)?;
        let bytes = object.btf.ok_or(OpenError::Missing { what: "section", name: ".BTF" })?.to_bytes();
        let maps = btf::maps(&bytes).map_err(|error| OpenError::Types { reason: error.to_string() })?;
        let programs = ProgramName::ALL.iter().map(|program| program.as_str().to_owned()).collect();
        Ok(Self { number: LAYOUT, readable_by: READABLE_BY, programs, maps })
    }

    /// What the maps pinned in a directory say of themselves; nothing, if there are none or nobody has written to them.
    pub(super) fn pinned(directory: &Path) -> Result<Option<Self>, OpenError> {
        let path = directory.join("DESCRIPTION");
        if !path.exists() {
            return Ok(None);
        }
        let octets = RawMap::open(&path, "DESCRIPTION")?.read(&0_u32.to_ne_bytes())?;
        let end = octets.iter().position(|octet| *octet == 0).unwrap_or(octets.len());
        if end == 0 {
            return Ok(None);
        }
        let parsed = Self::parse(&String::from_utf8_lossy(&octets[..end]));
        let error = |error: TextError| OpenError::IncompatiblePin { path, difference: error.to_string() };
        parsed.map(Some).map_err(error)
    }

    /// Has the maps pinned in a directory say this of themselves.
    pub(super) fn write(&self, directory: &Path) -> Result<(), OpenError> {
        let mut octets = self.to_string().into_bytes();
        octets.resize(ROOM, 0);
        let map = RawMap::open(&directory.join("DESCRIPTION"), "DESCRIPTION")?;
        Ok(map.put(&0_u32.to_ne_bytes(), &octets)?)
    }

    /// From the text in `DESCRIPTION`. Words of lines that nobody knows yet are passed over.
    fn parse(text: &str) -> Result<Self, TextError> {
        let (mut number, mut readable_by) = (None, None);
        let (mut programs, mut maps) = (BTreeSet::new(), BTreeMap::<String, MapFields>::new());
        let mut last = None;
        for (index, text) in text.lines().enumerate() {
            let error = || TextError::Line { line: index + 1, text: text.to_owned() };
            let words: Vec<&str> = text.split(' ').collect();
            match words.as_slice() {
                ["layout", word] => number = Some(word.parse().ok().ok_or_else(error)?),
                ["readable-by", word] => readable_by = Some(word.parse().ok().ok_or_else(error)?),
                ["program", name] => {
                    programs.insert((*name).to_owned());
                }
                ["map", name] => {
                    last = Some((*name).to_owned());
                    maps.insert((*name).to_owned(), MapFields::default());
                }
                [side @ ("key" | "value"), rest @ ..] => {
                    let fields = last.as_ref().and_then(|last| maps.get_mut(last)).ok_or_else(error)?;
                    let side = if *side == "key" { &mut fields.key } else { &mut fields.value };
                    side.0.push(field(rest).ok_or_else(error)?);
                }
                _ => {}
            }
        }
        Ok(Self {
            number: number.ok_or(TextError::Missing("layout"))?,
            readable_by: readable_by.ok_or(TextError::Missing("readable-by"))?,
            programs,
            maps,
        })
    }
}

fn field(words: &[&str]) -> Option<Field> {
    let [name, offset, size] = words else { return None };
    let (offset, size) = (offset.parse().ok()?, size.parse().ok()?);
    // No entry is as long as that: what says so was not written by an agent.
    let is_sound = |bytes: usize| bytes <= ROOM;
    (is_sound(offset) && is_sound(size)).then(|| Field { name: (*name).to_owned(), offset, size })
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "layout {}\nreadable-by {}", self.number, self.readable_by)?;
        self.programs.iter().try_for_each(|program| writeln!(f, "program {program}"))?;
        self.maps.iter().try_for_each(|(name, fields)| {
            writeln!(f, "map {name}")?;
            let sides = [("key", &fields.key), ("value", &fields.value)];
            sides.into_iter().try_for_each(|(side, fields)| {
                fields
                    .0
                    .iter()
                    .try_for_each(|Field { name, offset, size }| writeln!(f, "{side} {name} {offset} {size}"))
            })
        })
    }
}

/// What is to be done with maps that are pinned.
#[derive(Debug)]
pub(super) enum Footing {
    /// They are this version's, or there are none.
    Own,
    /// They are another version's, whose entries can be taken over.
    Other(Box<Layout>),
}

/// Looks at the maps pinned in a directory; changes nothing.
pub(super) fn footing(directory: &Path, own: &Layout) -> Result<Footing, OpenError> {
    match Layout::pinned(directory)? {
        Some(theirs) if theirs.readable_by > own.number => {
            Err(OpenError::NewerLayout { path: directory.into(), found: theirs.number, needed: theirs.readable_by })
        }
        Some(theirs) if theirs != *own => Ok(Footing::Other(Box::new(theirs))),
        _ => Ok(Footing::Own),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proxy_common::{
        addr::Ipv6,
        description::ROOM,
        flow::Flow,
        node::{LAYOUT, Node},
        service::{Frontend, Service},
    };

    use super::{Field, Fields, Layout, MapFields, TextError};
    use crate::dataplane::{Options, load::map_names};

    #[test]
    fn every_map_is_described_by_the_fields_of_its_types() {
        let own = Layout::own().unwrap();
        let described: Vec<_> = own.maps.keys().cloned().collect();
        let existing: Vec<_> = map_names(&Options::new("/sys/fs/bpf/sluice")).unwrap().into_iter().collect();
        assert_eq!(described, existing);

        let (services, flows) = (&own.maps["SERVICES_V6"], &own.maps["FLOWS_V6"]);
        assert_eq!(services.key.size(), size_of::<Frontend<Ipv6>>());
        assert_eq!(services.value.size(), size_of::<Service>());
        assert_eq!(flows.value.size(), size_of::<Flow<Ipv6>>());
        let expected =
            std::mem::offset_of!(Flow<Ipv6>, next_hop) + std::mem::offset_of!(proxy_common::flow::NextHop, mtu);
        let mtu = Field { name: "next_hop.mtu".into(), offset: expected, size: 2 };
        assert_eq!(flows.value.get("next_hop.mtu"), Some(&mtu));
        let third = own.maps["NODE"].value.get("further_v6.2.octets").unwrap();
        assert_eq!((third.offset, third.size), (std::mem::offset_of!(Node, further_v6) + 32, 16));
        assert_eq!(own.maps["SLOTS"].value.get("self").map(|field| field.size), Some(4));
        assert_eq!(own.maps["SOURCES_V4"].key.get("prefix_len").map(|field| field.size), Some(4));
    }

    /// Whatever is between fields would be lost in a conversion.
    #[test]
    fn fields_leave_no_byte_out() {
        for (name, MapFields { key, value }) in Layout::own().unwrap().maps {
            for fields in [key, value] {
                let covered: usize = fields.0.iter().map(|field| field.size).sum();
                assert_eq!(covered, fields.size(), "{name}: {fields:?}");
            }
        }
    }

    #[test]
    fn a_description_has_room_and_is_read_as_it_was_written() {
        let own = Layout::own().unwrap();
        let text = own.to_string();
        assert!(text.len() < ROOM * 3 / 4, "{} bytes", text.len());
        assert_eq!(Layout::parse(&text), Ok(own));
        assert!(text.starts_with(&format!("layout {LAYOUT}\n")), "{text}");
    }

    #[test]
    fn what_a_later_version_says_besides_is_passed_over() {
        let text = "layout 9\nreadable-by 7\nsomething new\nmap A\nkey self 0 4\nvalue a.b 0 2\nhint x\n";
        let layout = Layout::parse(text).unwrap();
        assert_eq!((layout.number, layout.readable_by), (9, 7));
        let field = Field { name: "a.b".into(), offset: 0, size: 2 };
        assert_eq!(layout.maps["A"].value, Fields(vec![field]));
    }

    #[test]
    fn what_is_no_description_is_named() {
        assert_eq!(Layout::parse("layout 7\n"), Err(TextError::Missing("readable-by")));
        let error = Layout::parse("layout 7\nreadable-by 7\nkey self 0 4\n").unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
        assert!(Layout::parse("layout 7\nreadable-by 7\nmap A\nkey self 0 99999999999999\n").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "((layout|readable-by|map|key|value|program)( [a-z0-9]{0,5}){0,4}\n){0,9}") {
            let _ = Layout::parse(&text);
        }
    }
}
