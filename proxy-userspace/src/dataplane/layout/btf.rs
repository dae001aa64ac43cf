//! What a BPF object says of its maps' types, by the kernel's BPF Type Format (Documentation/bpf/btf.rst). In: the bytes of the
//! section `.BTF`. Out: the fields of every map's keys and values, those of structures in structures by their whole names.

use std::collections::BTreeMap;

use super::{Field, Fields, MapFields};

/// Why the bytes are no types of maps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BtfError {
    #[error("the type information ends too early")]
    Truncated,
    #[error("type {0} is of an unknown kind")]
    Kind(u32),
    #[error("there is no type {0}")]
    Unknown(u32),
    #[error("types are nested too deeply at type {0}")]
    Depth(u32),
}

/// Types in types, at most.
const DEPTH: usize = 16;

const INT: u32 = 1;
const POINTER: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FORWARD: u32 = 7;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// One type: `struct btf_type` and the words behind it.
#[derive(Clone, Copy, Debug)]
struct Type<'a> {
    name: u32,
    info: u32,
    /// Its size, or the type it refers to.
    size_or_target: u32,
    details: &'a [u8],
}

impl Type<'_> {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn detail(&self, index: usize) -> Result<u32, BtfError> {
        word(self.details, index * 4)
    }

    /// Members of a structure: name, type, offset in bits.
    fn members(&self) -> impl Iterator<Item = Result<(u32, u32, u32), BtfError>> {
        let count = if self.kind() == STRUCT { (self.info & 0xffff) as usize } else { 0 };
        (0..count).map(|member| {
            Ok((self.detail(member * 3)?, self.detail(member * 3 + 1)?, self.detail(member * 3 + 2)? & 0x00ff_ffff))
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
    four.map(u32::from_ne_bytes).ok_or(BtfError::Truncated)
}

/// All types of an object; the first one has number 1.
struct Types<'a> {
    types: Vec<Type<'a>>,
    strings: &'a [u8],
}

/// The fields of every map's keys and values, by the name of the map. Maps without keys are left out.
pub(super) fn maps(bytes: &[u8]) -> Result<BTreeMap<String, MapFields>, BtfError> {
    let types = Types::parse(bytes)?;
    let mut maps = BTreeMap::new();
    for section in types.types.iter().filter(|one| one.kind() == DATASEC && types.name(one.name) == ".maps") {
        for variable in 0..(section.info & 0xffff) as usize {
            let variable = types.get(section.detail(variable * 3)?)?;
            if let Some(fields) = types.map(variable.size_or_target)? {
                maps.insert(types.name(variable.name).to_owned(), fields);
            }
        }
    }
    Ok(maps)
}

impl<'a> Types<'a> {
    /// `struct btf_header`, then the types and the strings where it says.
    fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let header = word(bytes, 4)? as usize;
        let section = |offset: usize| -> Result<&'a [u8], BtfError> {
            let start = header + word(bytes, offset)? as usize;
            bytes.get(start..start + word(bytes, offset + 4)? as usize).ok_or(BtfError::Truncated)
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        let mut types = Vec::new();
        while !rest.is_empty() {
            let (name, info, size_or_target) = (word(rest, 0)?, word(rest, 4)?, word(rest, 8)?);
            let length = details(info, types.len() as u32 + 1)?;
            let details = rest.get(12..12 + length).ok_or(BtfError::Truncated)?;
            types.push(Type { name, info, size_or_target, details });
            rest = &rest[12 + length..];
        }
        Ok(Self { types, strings })
    }

    fn get(&self, number: u32) -> Result<&Type<'a>, BtfError> {
        let index = (number as usize).checked_sub(1);
        index.and_then(|index| self.types.get(index)).ok_or(BtfError::Unknown(number))
    }

    fn name(&self, offset: u32) -> &'a str {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        let end = rest.iter().position(|octet| *octet == 0).unwrap_or(rest.len());
        std::str::from_utf8(&rest[..end]).unwrap_or_default()
    }

    /// A map's definition is a structure whose members `key` and `value` point to the types.
    fn map(&self, definition: u32) -> Result<Option<MapFields>, BtfError> {
        let (mut key, mut value) = (None, None);
        for member in self.get(definition)?.members() {
            let (name, kind, _) = member?;
            let place = match self.name(name) {
                "key" => &mut key,
                "value" => &mut value,
                _ => continue,
            };
            *place = Some(self.fields(self.get(kind)?.size_or_target)?);
        }
        Ok(key.zip(value).map(|(key, value)| MapFields { key, value }))
    }

    fn fields(&self, number: u32) -> Result<Fields, BtfError> {
        let mut fields = Fields::default();
        self.add(number, "", 0, &mut fields, 0)?;
        Ok(fields)
    }

    fn add(&self, number: u32, name: &str, at: usize, fields: &mut Fields, depth: usize) -> Result<(), BtfError> {
        if depth > DEPTH {
            return Err(BtfError::Depth(number));
        }
        let below = |inner: &str| if name.is_empty() { inner.to_owned() } else { format!("{name}.{inner}") };
        let one = self.get(number)?;
        match one.kind() {
            TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => {
                self.add(one.size_or_target, name, at, fields, depth + 1)
            }
            STRUCT => one.members().try_for_each(|member| {
                let (inner, kind, bits) = member?;
                self.add(kind, &below(self.name(inner)), at + bits as usize / 8, fields, depth + 1)
            }),
            ARRAY if self.get(one.detail(0)?)?.kind() == STRUCT => {
                let (element, count) = (one.detail(0)?, one.detail(2)? as usize);
                let size = self.size(element, depth)?;
                (0..count).try_for_each(|index| {
                    self.add(element, &below(&index.to_string()), at + index * size, fields, depth + 1)
                })
            }
            _ => {
                let name = if name.is_empty() { "self" } else { name }.to_owned();
                fields.0.push(Field { name, offset: at, size: self.size(number, depth)? });
                Ok(())
            }
        }
    }

    fn size(&self, number: u32, depth: usize) -> Result<usize, BtfError> {
        if depth > DEPTH {
            return Err(BtfError::Depth(number));
        }
        let one = self.get(number)?;
        match one.kind() {
            INT | STRUCT | UNION | ENUM | ENUM64 | FLOAT => Ok(one.size_or_target as usize),
            POINTER => Ok(8),
            ARRAY => Ok(self.size(one.detail(0)?, depth + 1)? * one.detail(2)? as usize),
            TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => self.size(one.size_or_target, depth + 1),
            _ => Err(BtfError::Kind(number)),
        }
    }
}

/// Bytes behind the three words that every type has.
fn details(info: u32, number: u32) -> Result<usize, BtfError> {
    let count = (info & 0xffff) as usize;
    match info >> 24 & 0x1f {
        POINTER | FORWARD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC | FLOAT | TYPE_TAG => Ok(0),
        INT | VAR | DECL_TAG => Ok(4),
        ARRAY => Ok(12),
        STRUCT | UNION | DATASEC | ENUM64 => Ok(12 * count),
        ENUM | FUNC_PROTO => Ok(8 * count),
        _ => Err(BtfError::Kind(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::{BtfError, maps};

    #[test]
    fn bytes_that_are_no_types_are_an_error_and_no_panic() {
        assert_eq!(maps(&[]).unwrap_err(), BtfError::Truncated);
        assert_eq!(maps(&[0xff; 64]).unwrap_err(), BtfError::Truncated);
    }
}
