//! `init`: creates a store.

use clap::Args;
use serde::Serialize;
use stillframe::RegionSize;
use stillframe::codec::Codec;

use crate::context::{Context, display};
use crate::errors::Exit;
use crate::human;
use crate::values::region_size;

const EXAMPLES: &str = "\
Examples:
  stillframe init
  stillframe --store /var/lib/vm-snapshots init --codec zstd";

/// Create a store
///
/// An existing store is refused. The first capture also creates a store, with the default options.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Init {
    /// Size of a region [default: 16384]
    ///
    /// A region is the unit of deduplication: a power of two from 512 to 65536.
    #[arg(long, value_name = "BYTES", value_parser = region_size, default_value_t = RegionSize::default().into())]
    #[arg(hide_default_value = true)]
    region_size: u32,
    /// Compression: lz4, zstd or none [default: lz4]
    ///
    /// zstd is smaller and slower.
    #[arg(long, value_name = "CODEC", default_value_t = Codec::default(), hide_default_value = true)]
    codec: Codec,
}

#[derive(Serialize)]
struct InitJson {
    store: String,
    format: u32,
    region_size: usize,
    codec: String,
}

/// Creates a store.
pub(super) fn init(context: &Context, arguments: &Init) -> anyhow::Result<Exit> {
    let output = &context.output;
    let options =
        context.options().region_size(RegionSize::new(arguments.region_size)?).codec(arguments.codec);
    let info = options.create(context.store_path()?)?.info();
    if output.json {
        output.json(&InitJson {
            store: info.path.to_string_lossy().into_owned(),
            format: info.format,
            region_size: info.region_size.bytes(),
            codec: info.codec.to_string(),
        })?;
    } else if !output.quiet {
        output.text(&output.lines(&[
            ("store", display(&info.path)),
            ("format", info.format.to_string()),
            ("regions", human::size(info.region_size.bytes() as u64)),
            ("codec", info.codec.to_string()),
        ]))?;
        output.hint("take a snapshot: stillframe capture --pid PID");
    }
    Ok(Exit::Done)
}
