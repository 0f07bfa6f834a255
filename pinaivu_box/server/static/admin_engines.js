// The page of engines and devices.

import { live } from "./admin.js";
import "./admin_loaded.js";

live(2);
