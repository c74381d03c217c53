//! Draws the plot of the README: bytes of each further snapshot, one panel for each workload.
//!
//! It has no background, and its greys and colours are legible on white and on black, so it suits
//! pages of both themes.

use crate::contender::default_name;
use crate::play::Run;
use crate::workload::Description;

/// The contenders to draw, with colour and line width; stillframe is drawn with its defaults.
const LINES: [(&str, &str, f64); 6] = [
    ("stillframe", "#2f81f7", 3.0),
    ("journal 512 B", "#d29922", 1.6),
    ("journal 128 B", "#e5646a", 1.6),
    ("4 KiB dedup", "#8b949e", 1.6),
    ("borg", "#a371f7", 1.6),
    ("restic", "#3fb950", 1.6),
];

const TEXT_COLOUR: &str = "#848d97";
const PANEL_WIDTH: f64 = 270.0;
const PANEL_HEIGHT: f64 = 260.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 58.0;
const BOTTOM: f64 = TOP + PANEL_HEIGHT;
const GAP: f64 = 22.0;
const HEIGHT: f64 = BOTTOM + 74.0;
const LEGEND_WIDTH: f64 = 138.0;

pub fn svg(all: &[(Description, Vec<Run>)]) -> String {
    let scale = Scale::of(all);
    let width = LEFT + all.len() as f64 * (PANEL_WIDTH + GAP);
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="{TEXT_COLOUR}" role="img">
<title>Bytes that each further snapshot adds, by workload, on a logarithmic axis</title>
"##
    );
    out += &text(LEFT, 20.0, "start", "What each further snapshot adds, everything counted, means of five");
    for power in scale.powers() {
        out += &text(LEFT - 8.0, scale.y(10f64.powi(power)) + 4.0, "end", &bytes_label(power));
    }
    for (at, (workload, runs)) in all.iter().enumerate() {
        out += &panel(LEFT + at as f64 * (PANEL_WIDTH + GAP), &scale, workload, runs);
    }
    let is_there = |label: &str| all.iter().any(|(_, runs)| runs.iter().any(|run| run.name == drawn(label)));
    for (at, (label, colour, thickness)) in LINES.iter().filter(|line| is_there(line.0)).enumerate() {
        let (x, y) = (LEFT + at as f64 * LEGEND_WIDTH, BOTTOM + 52.0);
        out += &curve(&[(x, y), (x + 22.0, y)], colour, *thickness);
        out += &text(x + 28.0, y + 4.0, "start", label);
    }
    out + "</svg>\n"
}

fn panel(left: f64, scale: &Scale, workload: &Description, runs: &[Run]) -> String {
    let mut out = text(left, TOP - 12.0, "start", workload.title);
    for power in scale.powers() {
        let y = scale.y(10f64.powi(power));
        out += &curve(&[(left, y), (left + PANEL_WIDTH, y)], TEXT_COLOUR, 0.3);
    }
    let further = runs.first().map_or(1, |run| run.series_bytes.len());
    out += &text(left, BOTTOM + 18.0, "start", "snapshot 2");
    out += &text(left + PANEL_WIDTH, BOTTOM + 18.0, "end", &format!("snapshot {}", further + 1));
    let step = PANEL_WIDTH / (further as f64 - 1.0).max(1.0);
    // stillframe last: on top.
    for (label, colour, thickness) in LINES.iter().rev() {
        let Some(run) = runs.iter().find(|run| run.name == drawn(label)) else { continue };
        let means = means(&run.series_bytes).into_iter().enumerate();
        let points: Vec<_> = means.map(|(at, bytes)| (left + at as f64 * step, scale.y(bytes))).collect();
        out += &curve(&points, colour, *thickness);
    }
    out
}

/// The mean of each value and its neighbours, two on each side: files grow in steps, and shrink.
fn means(series_bytes: &[f64]) -> Vec<f64> {
    let around = |at: usize| &series_bytes[at.saturating_sub(2)..series_bytes.len().min(at + 3)];
    (0..series_bytes.len()).map(|at| around(at).iter().sum::<f64>() / around(at).len() as f64).collect()
}

/// The vertical axis, logarithmic, in whole powers of ten.
struct Scale {
    lowest: i32,
    highest: i32,
}

impl Scale {
    fn of(all: &[(Description, Vec<Run>)]) -> Self {
        let runs = all.iter().flat_map(|(_, runs)| runs);
        let runs = runs.filter(|run| LINES.iter().any(|(label, ..)| drawn(label) == run.name));
        let powers = runs.flat_map(|run| means(&run.series_bytes)).map(|bytes| bytes.max(100.0).log10());
        let (lowest, highest) =
            powers.fold((6.0, 3.0), |(low, high): (f64, f64), power| (low.min(power), high.max(power)));
        #[allow(clippy::cast_possible_truncation)] // A power of ten of a number of bytes.
        Scale { lowest: lowest.floor() as i32, highest: highest.ceil() as i32 }
    }

    fn powers(&self) -> impl Iterator<Item = i32> {
        self.lowest..=self.highest
    }

    fn y(&self, bytes: f64) -> f64 {
        let (lowest, highest) = (f64::from(self.lowest), f64::from(self.highest));
        let power = bytes.max(1.0).log10().clamp(lowest, highest);
        TOP + PANEL_HEIGHT * (highest - power) / (highest - lowest)
    }
}

/// The name of the run that is drawn under a label.
fn drawn(label: &str) -> String {
    if label == "stillframe" { default_name() } else { label.to_owned() }
}

fn text(x: f64, y: f64, anchor: &str, content: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>\n")
}

fn curve(points: &[(f64, f64)], colour: &str, thickness: f64) -> String {
    let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let points = points.join(" ");
    format!(
        "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{thickness}\"/>\n"
    )
}

fn bytes_label(power: i32) -> String {
    let (unit, power) = match power {
        6.. => ("MB", power - 6),
        3..6 => ("kB", power - 3),
        _ => ("B", power),
    };
    format!("{} {unit}", 10f64.powi(power))
}
