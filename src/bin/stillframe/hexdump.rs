//! A hex dump with real addresses, in the format of `hexdump -C`.
//!
//! ```text
//! 55d0c3a01000  7f 45 4c 46 02 01 01 00  00 00 00 00 00 00 00 00  |.ELF............|
//! 55d0c3a01010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
//! *                                                    lines equal to the line above
//! 55d0c3a02000                                         the end address
//! ```

use std::io::{self, Write};

const LINE_BYTES: usize = 16;

/// Writes the bytes written to it as a hex dump.
pub(crate) struct HexDump<W: Write> {
    out: W,
    /// The address of the first pending byte.
    address: u64,
    pending: Vec<u8>,
    /// The last full line, and whether a `*` has been printed for its repetitions.
    last: Option<[u8; LINE_BYTES]>,
    starred: bool,
}

impl<W: Write> HexDump<W> {
    /// A dump of bytes that begin at `address`.
    pub(crate) fn new(out: W, address: u64) -> HexDump<W> {
        HexDump { out, address, pending: Vec::with_capacity(LINE_BYTES), last: None, starred: false }
    }

    /// Ends the dump with the address after the last byte.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            let line = std::mem::take(&mut self.pending);
            self.line(&line)?;
        }
        writeln!(self.out, "{:012x}", self.address)?;
        self.out.flush()
    }

    /// Prints one line, or a star for a full line that equals the one before.
    fn line(&mut self, bytes: &[u8]) -> io::Result<()> {
        let full = <[u8; LINE_BYTES]>::try_from(bytes).ok();
        if full.is_some() && full == self.last {
            if !self.starred {
                self.out.write_all(b"*\n")?;
            }
            self.starred = true;
        } else {
            write_line(&mut self.out, self.address, bytes)?;
            self.starred = false;
        }
        self.last = full;
        // The last line may end at the last 64-bit address.
        self.address = self.address.saturating_add(bytes.len() as u64);
        Ok(())
    }
}

impl<W: Write> Write for HexDump<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while self.pending.len() + rest.len() >= LINE_BYTES {
            let (head, tail) = rest.split_at(LINE_BYTES - self.pending.len());
            let mut line = [0; LINE_BYTES];
            line[..self.pending.len()].copy_from_slice(&self.pending);
            line[self.pending.len()..].copy_from_slice(head);
            self.line(&line)?;
            self.pending.clear();
            rest = tail;
        }
        self.pending.extend_from_slice(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn write_line(out: &mut impl Write, address: u64, bytes: &[u8]) -> io::Result<()> {
    let mut line = Vec::with_capacity(96);
    write!(line, "{address:012x} ")?;
    for at in 0..LINE_BYTES {
        if at % 8 == 0 {
            line.push(b' ');
        }
        match bytes.get(at) {
            Some(byte) => write!(line, "{byte:02x} ")?,
            None => line.extend_from_slice(b"   "),
        }
    }
    line.extend_from_slice(b" |");
    line.extend(bytes.iter().map(|byte| if (0x20..0x7f).contains(byte) { *byte } else { b'.' }));
    line.extend_from_slice(b"|\n");
    out.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(pieces: &[&[u8]], address: u64) -> String {
        let mut text = Vec::new();
        let mut dump = HexDump::new(&mut text, address);
        pieces.iter().for_each(|piece| dump.write_all(piece).unwrap());
        dump.finish().unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_dump_looks_like_that_of_hexdump() {
        assert_eq!(
            dump(&[b"stillframe\x00\xff and more"], 0x1000),
            "000000001000  73 74 69 6c 6c 66 72 61  6d 65 00 ff 20 61 6e 64  |stillframe.. and|\n\
             000000001010  20 6d 6f 72 65                                    | more|\n\
             000000001015\n"
        );
    }

    #[test]
    fn repeated_lines_become_one_star_however_the_bytes_arrive() {
        let whole = dump(&[&[7; 100]], 0);
        assert_eq!(whole.lines().count(), 4, "{whole}");
        assert_eq!(whole.lines().nth(1), Some("*"));
        for piece_bytes in [1, 3, 15, 16, 17, 99] {
            let bytes = [7; 100];
            let pieces: Vec<&[u8]> = bytes.chunks(piece_bytes).collect();
            assert_eq!(dump(&pieces, 0), whole, "in pieces of {piece_bytes}");
        }
    }

    #[test]
    fn the_last_address_of_all_is_no_trouble() {
        assert!(dump(&[&[1; 15]], u64::MAX - 15).ends_with("ffffffffffffffff\n"));
    }
}
