"""Frustum: keeps MuJoCo from drawing what lies beside a camera's view. The picture stays the same to the last bit.

Called by `robots.metaworld` before it renders. MuJoCo draws every mesh of a scene; for a software rasteriser these
triangles are most of a small picture's cost, and a camera on the gripper has most of the arm behind it.
"""

from typing import Any

import numpy as np


def drop_unseen(mujoco: Any, scene: Any, model: Any, data: Any) -> int:
    """Turn the geoms whose bounding spheres lie outside the view into nothing, until the next update of the scene.

    Returns how many. `scene` has just been updated from `data`.
    """
    is_geom = int(mujoco.mjtObj.mjOBJ_GEOM)
    rows = [row for row in range(scene.ngeom) if scene.geoms[row].objtype == is_geom]
    geom_ids = [scene.geoms[row].objid for row in rows]
    camera = scene.camera[0]  # of two eyes, which are one here
    forward, up = np.asarray(camera.forward), np.asarray(camera.up)
    near, top = camera.frustum_near, camera.frustum_top
    half_width = camera.frustum_width or top  # 0: square
    radius = model.geom_rbound[geom_ids]  # 0 of a plane, which has no bounds
    offset = data.geom_xpos[geom_ids] - np.asarray(camera.pos)
    depth = offset @ forward
    aside, above = np.abs(offset @ np.cross(forward, up)), np.abs(offset @ up)
    is_behind = depth < near - radius
    is_beside = near * aside - half_width * depth > radius * np.hypot(near, half_width)
    is_above = near * above - top * depth > radius * np.hypot(near, top)
    is_unseen = (is_behind | is_beside | is_above) & (radius > 0)
    for index in np.flatnonzero(is_unseen):
        scene.geoms[rows[index]].type = mujoco.mjtGeom.mjGEOM_NONE
    return int(is_unseen.sum())
