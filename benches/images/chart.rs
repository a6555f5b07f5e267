//! The table as a picture: four panels of bars, one for each figure that people choose an image by.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Row;
use crate::image::Image;
use crate::run::Figures;

const SIZE: (u32, u32) = (960, 420);
const MUSL: RGBColor = RGBColor(0xb7, 0x41, 0x0e);
const GLIBC: RGBColor = RGBColor(0x6b, 0x77, 0x85);

/// Draws the rows that were measured.
pub fn draw(rows: &[Row], path: &Path) -> Result<()> {
    let measured: Vec<(&Image, &Figures)> = rows
        .iter()
        .filter_map(|row| Some((&row.image, row.figures.as_ref()?)))
        .collect();
    let panels: [(&str, Vec<f64>); 4] = [
        (
            "compressed image, MB",
            values(&measured, |i, _| i.compressed as f64 / 1e6),
        ),
        (
            "start to ready, ms",
            values(&measured, |_, f| f.ready.as_secs_f64() * 1e3),
        ),
        (
            "memory under load, MB",
            values(&measured, |_, f| f.loaded as f64 / 1e6),
        ),
        (
            "full clones per second",
            values(&measured, |_, f| f.clones_per_second),
        ),
    ];
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let drawn = (|| -> Result<(), Box<dyn std::error::Error>> {
        root.fill(&WHITE)?;
        for (area, (title, values)) in root.split_evenly((2, 2)).iter().zip(&panels) {
            panel(area, title, values, &measured)?;
        }
        root.present()?;
        Ok(())
    })();
    drawn
        .map_err(|error| anyhow::anyhow!("{error}"))
        .with_context(|| format!("cannot draw {}", path.display()))
}

fn values(measured: &[(&Image, &Figures)], value: impl Fn(&Image, &Figures) -> f64) -> Vec<f64> {
    measured
        .iter()
        .map(|(image, figures)| value(image, figures))
        .collect()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(
    area: &Area<'_>,
    title: &str,
    values: &[f64],
    measured: &[(&Image, &Figures)],
) -> Result<(), Box<dyn std::error::Error>> {
    let most = values.iter().copied().fold(0.0, f64::max);
    let rows = values.len() as i32;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, ("sans-serif", 17))
        .build_cartesian_2d(-most * 0.42..most * 1.2, 0.0..f64::from(rows))?;
    let right = Pos::new(HPos::Right, VPos::Center);
    let left = Pos::new(HPos::Left, VPos::Center);
    for (row, (value, (image, _))) in values.iter().zip(measured).enumerate() {
        // The first row is at the top.
        let middle = f64::from(rows) - row as f64 - 0.5;
        let color = if image.variant.libc == "musl" {
            MUSL
        } else {
            GLIBC
        };
        chart.draw_series([Rectangle::new(
            [(0.0, middle - 0.32), (*value, middle + 0.32)],
            color.filled(),
        )])?;
        let label = |text: String, x: f64, anchor| {
            Text::new(
                text,
                (x, middle),
                ("sans-serif", 13).into_font().color(&BLACK).pos(anchor),
            )
        };
        chart.draw_series([
            label(image.variant.title(), -most * 0.015, right),
            label(format!("{value:.1}"), value + most * 0.015, left),
        ])?;
    }
    Ok(())
}
