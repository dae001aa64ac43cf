//! Whether a program needs anything but a kernel, by its program headers (ELF64, little-endian; elf(5)).

use anyhow::{Context as _, Result, ensure};

const PT_INTERP: u32 = 3;
const PT_DYNAMIC: u32 = 2;
const DT_NEEDED: u64 = 1;

/// What of a program is loaded from elsewhere: its interpreter, and libraries. Nothing of a static one.
pub(super) fn dynamic(program: &[u8]) -> Result<Vec<&'static str>> {
    ensure!(program.starts_with(b"\x7fELF\x02\x01"), "this is no program for 64 bits, little-endian");
    let (offset, size, count) = (number(program, 32, 8)?, number(program, 54, 2)?, number(program, 56, 2)?);
    let mut found = Vec::new();
    for index in 0..count {
        let header = program.get(position(offset + index * size)?..).context("a header is missing")?;
        match u32::try_from(number(header, 0, 4)?)? {
            PT_INTERP => found.push("an interpreter"),
            PT_DYNAMIC if needs_libraries(program, header)? => found.push("libraries"),
            _ => {}
        }
    }
    Ok(found)
}

/// Whether the table of tags and values that a header is about names a library.
fn needs_libraries(program: &[u8], header: &[u8]) -> Result<bool> {
    let start = position(number(header, 8, 8)?)?;
    let end = start + position(number(header, 32, 8)?)?;
    let table = program.get(start..end).context("the table of libraries is missing")?;
    Ok(table.chunks_exact(16).any(|entry| number(entry, 0, 8).is_ok_and(|tag| tag == DT_NEEDED)))
}

fn number(bytes: &[u8], at: usize, length: usize) -> Result<u64> {
    let bytes = bytes.get(at..at + length).context("the program is cut short")?;
    Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn position(number: u64) -> Result<usize> {
    Ok(usize::try_from(number)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::dynamic;

    /// A program of headers of these types, of which a dynamic one names `tag`.
    pub(in crate::image) fn program(types: &[u32], tag: u64) -> Vec<u8> {
        let mut program = vec![0; 64];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[32] = 64;
        program[54] = 56;
        program[56] = types.len() as u8;
        let table = 64 + 56 * types.len() as u64;
        for kind in types {
            let mut header = vec![0; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&table.to_le_bytes());
            header[32] = 32;
            program.extend(header);
        }
        program.extend([tag, 0, 0, 0].map(u64::to_le_bytes).concat());
        program
    }

    #[test]
    fn a_program_with_an_interpreter_or_libraries_is_not_static() {
        let cases = [
            ("static", vec![1], 0, vec![]),
            ("static, at any address", vec![1, 2], 5, vec![]),
            ("with libraries", vec![1, 2], 1, vec!["libraries"]),
            ("as it is usual", vec![3, 1, 2], 1, vec!["an interpreter", "libraries"]),
        ];
        for (name, types, tag, expected) in cases {
            assert_eq!(dynamic(&program(&types, tag)).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn what_is_no_program_is_not_taken_for_a_static_one() {
        dynamic(b"#!/bin/sh\n").unwrap_err();
        dynamic(&program(&[3, 1, 2], 1)[..100]).unwrap_err();
    }

    #[test]
    fn the_program_of_these_tests_is_as_usual() {
        let program = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(dynamic(&program).unwrap(), ["an interpreter", "libraries"]);
    }
}
