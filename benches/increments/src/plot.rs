//! The plot of the README: bytes of each further snapshot, one panel a workload, drawn by hand.
//!
//! It stands on whatever is behind it: the greys and colours are legible on white and on black.

use std::fmt::Write;

use crate::play::Run;

/// Who is drawn, and how; the default region size speaks for stillframe.
const LINES: [(&str, &str, &str); 6] = [
    ("stillframe", "#2f81f7", "3"),
    ("journal 512 B", "#d29922", "1.6"),
    ("journal 128 B", "#e5646a", "1.6"),
    ("4 KiB dedup", "#8b949e", "1.6"),
    ("borg", "#a371f7", "1.6"),
    ("restic", "#3fb950", "1.6"),
];

const PANEL_WIDTH: f64 = 270.0;
const PANEL_HEIGHT: f64 = 260.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 58.0;
const GAP: f64 = 22.0;

pub fn svg(all: &[(&str, Vec<Run>)]) -> String {
    let stillframe = format!(
        "stillframe {} KiB {}",
        stillframe::RegionSize::default().bytes() >> 10,
        stillframe::Codec::default()
    );
    let drawn = |name: &str| if name == "stillframe" { stillframe.clone() } else { name.to_owned() };
    let is_drawn = |run: &&Run| LINES.iter().any(|(name, ..)| drawn(name) == run.name);
    let values =
        || all.iter().flat_map(|(_, runs)| runs.iter().filter(is_drawn)).flat_map(|run| &run.series_bytes);
    let lowest = values().copied().fold(f64::INFINITY, f64::min).max(100.0).log10().floor();
    let highest = values().copied().fold(1000.0, f64::max).log10().ceil();

    let width = LEFT + all.len() as f64 * (PANEL_WIDTH + GAP);
    let height = TOP + PANEL_HEIGHT + 74.0;
    let y =
        |bytes: f64| TOP + PANEL_HEIGHT * (highest - bytes.max(1.0).log10().max(lowest)) / (highest - lowest);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#848d97\" role=\"img\">\n\
         <title>Bytes that each further snapshot adds, by workload, on a logarithmic axis</title>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\" font-weight=\"600\">What each further snapshot adds, everything counted</text>\n"
    );
    for (panel, (name, runs)) in all.iter().enumerate() {
        let left = LEFT + panel as f64 * (PANEL_WIDTH + GAP);
        let right = left + PANEL_WIDTH;
        writeln!(out, "<text x=\"{left}\" y=\"{}\" font-weight=\"600\">{name}</text>", TOP - 12.0).unwrap();
        let mut power = lowest;
        while power <= highest {
            let at = y(10f64.powf(power));
            writeln!(out, "<line x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#848d97\" stroke-opacity=\"0.3\"/>").unwrap();
            if panel == 0 {
                let x = left - 8.0;
                writeln!(
                    out,
                    "<text x=\"{x}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                    at + 4.0,
                    bytes_label(power)
                )
                .unwrap();
            }
            power += 1.0;
        }
        let snapshots = runs.first().map_or(2, |run| run.series_bytes.len() + 1) as f64;
        let x = |snapshot: f64| left + PANEL_WIDTH * (snapshot - 2.0) / (snapshots - 2.0).max(1.0);
        for (number, anchor) in [(2.0, "start"), (snapshots, "end")] {
            let (x, at) = (x(number), TOP + PANEL_HEIGHT + 18.0);
            writeln!(out, "<text x=\"{x:.1}\" y=\"{at}\" text-anchor=\"{anchor}\">snapshot {number}</text>")
                .unwrap();
        }
        // stillframe last: on top.
        for (label, colour, thickness) in LINES.iter().rev() {
            let Some(run) = runs.iter().find(|run| run.name == drawn(label)) else { continue };
            let points = run.series_bytes.iter().enumerate();
            let points: Vec<String> =
                points.map(|(at, bytes)| format!("{:.1},{:.1}", x(at as f64 + 2.0), y(*bytes))).collect();
            writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{thickness}\" stroke-linejoin=\"round\"/>",
                points.join(" ")
            )
            .unwrap();
        }
    }
    for (at, (label, colour, thickness)) in LINES.iter().enumerate() {
        let (x, at) = (LEFT + at as f64 * 138.0, TOP + PANEL_HEIGHT + 52.0);
        writeln!(out, "<line x1=\"{x}\" x2=\"{}\" y1=\"{at}\" y2=\"{at}\" stroke=\"{colour}\" stroke-width=\"{thickness}\"/>", x + 22.0).unwrap();
        writeln!(out, "<text x=\"{}\" y=\"{}\">{label}</text>", x + 28.0, at + 4.0).unwrap();
    }
    out += "</svg>\n";
    out
}

fn bytes_label(power: f64) -> String {
    let bytes = 10f64.powf(power);
    match power {
        power if power >= 6.0 => format!("{} MB", bytes / 1e6),
        power if power >= 3.0 => format!("{} kB", bytes / 1e3),
        _ => format!("{bytes} B"),
    }
}
