//! `cat`: the memory of a snapshot, as bytes or as a hex dump.

use std::io::{self, BufWriter, Write};

use clap::Args;
use stillframe::{AddressRange, Snapshot};

use crate::context::Context;
use crate::errors::{CommandError, Exit};
use crate::hexdump::HexDump;
use crate::output::output_error;

const EXAMPLES: &str = "\
Examples:
  stillframe cat web-1~3 > memory
  stillframe cat latest --range 0x7f12a0..0x7f12c0 --hex";

/// Print the memory of a snapshot
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Cat {
    /// Snapshot to print
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// Only these addresses
    ///
    /// Decimal, or hexadecimal after 0x. Default: all captured memory.
    #[arg(long, value_name = "START..END")]
    range: Option<AddressRange>,
    /// Print a hex dump with addresses, not bytes
    #[arg(long)]
    hex: bool,
}

/// Prints the memory of a snapshot.
pub(super) fn cat(context: &Context, arguments: &Cat) -> anyhow::Result<Exit> {
    let store = context.open()?;
    let snapshot = store.snapshot(store.find(&arguments.snapshot)?)?;
    let mut out = Pipe { out: BufWriter::with_capacity(256 * 1024, io::stdout()), failed: None };
    let result = write_memory(&snapshot, arguments, &mut out);
    match out.failed {
        // The library would report this as an error of the snapshot.
        Some(error) => Err(output_error(error).into()),
        None => result.map(|()| Exit::Done),
    }
}

fn write_memory(snapshot: &Snapshot<'_>, arguments: &Cat, out: &mut Pipe) -> anyhow::Result<()> {
    match (arguments.hex, arguments.range) {
        (false, None) => drop(snapshot.read_image(out)?),
        (false, Some(range)) => drop(snapshot.read_range(range, out)?),
        (true, Some(range)) => write_hex(snapshot, range, out)?,
        (true, None) => {
            for (_, mapping) in snapshot.address_space()?.captured() {
                write_hex(snapshot, mapping.range, out)?;
            }
        }
    }
    Ok(out.flush().map_err(CommandError::Output)?)
}

fn write_hex(snapshot: &Snapshot<'_>, range: AddressRange, out: &mut Pipe) -> anyhow::Result<()> {
    let mut dump = HexDump::new(out, range.start());
    snapshot.read_range(range, &mut dump)?;
    Ok(dump.finish().map_err(CommandError::Output)?)
}

/// Buffered standard output. It keeps the error of a failed write.
struct Pipe {
    out: BufWriter<io::Stdout>,
    failed: Option<io::Error>,
}

impl Pipe {
    fn remember<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failed = Some(error);
            }
            kind.into()
        })
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes);
        self.remember(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.out.flush();
        self.remember(flushed)
    }
}
